"""Which tokens end a completion: in every place those that end one in training."""

import copy
from pathlib import Path

import pytest
from peft import LoraConfig
from test_trainer import make_trainer

from tests.conftest import make_model
from trl_drcd.policies import policy_for


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_tokenizers_eos_ends_a_completion_as_that_of_the_generation_config_does(tokenizer, guidance_scale):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "drum"
    model = make_model(tokenizer)
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    assert len(ends) == 2
    policy, prompts = policy_for(model, tokenizer), [[1, 5, 6]] * 64
    drawn = policy.rollout(model, prompts, [[1]] * 64, guidance_scale, 1.0, 60).completions()
    assert {row[-1] for row in drawn if len(row) < 60} == ends
    assert not any(ends & {*row[:-1]} for row in drawn)


def test_evaluation_and_training_end_alike(tmp_path: Path, tokenizer):
    """Of a base whose tokenizer has another eos than its generation config."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "drum"
    trainer = make_trainer(tmp_path, tokenizer, embedder=None, diversity_coef=0.0, peft_config=LoraConfig(r=2))
    ends = {*trainer.eos_token_ids}
    drawn = trainer.policy.rollout(trainer.model, [[1, 5, 6]] * 64, None, 1.0, 1.0, 60).completions()
    assert {row[-1] for row in drawn if len(row) < 60} == ends and len(ends) == 2
