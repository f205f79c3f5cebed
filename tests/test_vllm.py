"""Rollouts by vLLM: what is refused, and what the trainer does around an engine; the engine is a stand-in here."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from test_trainer import PROMPTS, make_trainer
from trl import RLOOTrainer

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.rollout import seed_colocated_vllm
from trl_drcd.validation.vllm import check_vllm, check_vllm_lengths


def settings(tmp_path, **changed):
    return CFGDistillDiversityConfig(str(tmp_path), use_cpu=True, bf16=False, **({"use_vllm": True} | changed))


def test_an_adapter_on_half_precision_is_refused(tmp_path, tokenizer, caplog):
    model = make_model(tokenizer).to(torch.bfloat16)
    check_vllm(model, settings(tmp_path, seed=7, vllm_mode="colocate"))
    assert not caplog.text
    check_vllm(model, settings(tmp_path, seed=7, vllm_mode="server"))
    assert "`seed=7` does not reach its rollouts" in caplog.text
    adapted = get_peft_model(model, LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"`use_vllm=True` with an adapter on a model in torch.bfloat16.*float32"):
        check_vllm(adapted, settings(tmp_path))
    check_vllm(adapted, settings(tmp_path, use_vllm=False))
    check_vllm(get_peft_model(make_model(tokenizer), LoraConfig(r=2)), settings(tmp_path))


@pytest.mark.parametrize(
    "changed",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}],
)
def test_an_adapter_that_unties_what_vllm_ties_is_refused(tmp_path, tokenizer, changed):
    """PEFT gives embedding and head values of their own; vLLM would sample with those of the embedding alone."""
    targets = {"target_modules": ["q_proj"]} | changed
    tied = make_model(tokenizer)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    with pytest.raises(ValueError, match=r"`use_vllm=True` with an adapter on the embedding or the head of a model"):
        check_vllm(get_peft_model(tied, LoraConfig(r=2, **targets)), settings(tmp_path))
    check_vllm(get_peft_model(make_model(tokenizer), LoraConfig(r=2, **targets)), settings(tmp_path))


@pytest.mark.parametrize("more", [{}, {"trainable_token_indices": [5]}])
def test_an_adapter_that_leaves_a_model_tied_is_not_refused(tmp_path, tokenizer, more):
    tied = make_model(tokenizer)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    check_vllm(get_peft_model(tied, LoraConfig(r=2, target_modules=["q_proj"], **more)), settings(tmp_path))


@pytest.mark.parametrize(("mode", "seeded"), [("colocate", True), ("server", False)])
def test_the_seed_reaches_a_colocated_engine(tmp_path, mode, seeded):
    """An engine seeds torch with the number of its process; the run's seed follows. Engines of two processes share."""

    def drawn(seed, process=0):
        torch.manual_seed(0)
        args = settings(tmp_path, seed=seed, vllm_mode=mode, vllm_tensor_parallel_size=2)
        seed_colocated_vllm(args, SimpleNamespace(process_index=process))
        return torch.rand(4).tolist()

    assert (drawn(1) != drawn(2)) == seeded
    assert (drawn(1) != drawn(1, process=2)) == seeded
    assert drawn(1) == drawn(1, process=1)
    assert (drawn(1) != drawn(0)) == seeded


def test_nothing_is_cut(tmp_path):
    args = settings(tmp_path, vllm_max_model_length=10, max_completion_length=6)
    check_vllm_lengths([[1] * 4, [1]], args)
    with pytest.raises(ValueError, match="a prompt of 5 tokens and `max_completion_length=6` do not fit"):
        check_vllm_lengths([[1], [1] * 5], args)
    check_vllm_lengths([[1] * 50], settings(tmp_path, use_vllm=False, vllm_max_model_length=10))


def test_the_engine_runs_without_autocast_and_gets_the_weights_of_every_training(tmp_path, tokenizer, monkeypatch):
    """TRL syncs weights where the step has changed: not in a second training, or once the best model is loaded."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, embedder=None)
    autocast, synced = [], []

    @contextmanager
    def cast():
        autocast.append(True)
        yield
        autocast.append(False)

    def engine(self, prompt_ids, images, multimodal_fields):
        assert not autocast or not autocast[-1], "vLLM inside of autocast"
        if self.state.global_step != self._last_loaded_step:
            synced.append(next(self.model.parameters()).detach().clone())
            self._last_loaded_step = self.state.global_step
        return [[5, 2]] * len(prompt_ids)

    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", engine)
    monkeypatch.setattr(trainer.accelerator, "autocast", cast)
    trainer.use_vllm = trainer.args.use_vllm = True
    trainer.train()
    trainer._generate_single_turn([[1, 5, 4]], None, {})
    assert len(synced) == 2
    trainer.state.global_step = 0
    trainer.train()
    assert len(synced) == 3 and PROMPTS
    assert all(torch.isfinite(weights).all() for weights in synced)
