"""Settings as YAML files and command lines have them, and the warm-up of the diversity coefficient."""

import copy
import json
import logging

import pytest
import torch
from conftest import make_model
from peft import LoraConfig
from test_trainer import make_trainer, rows

from trl_drcd.config import CFGDistillDiversityConfig, diversity_coef_at
from trl_drcd.evaluation.allowed import suppressed_tokens
from trl_drcd.evaluation.digests import content_digest
from trl_drcd.reliability.identity import identity_problem


def config(tmp_path, **changed) -> CFGDistillDiversityConfig:
    return CFGDistillDiversityConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **changed)


@pytest.mark.parametrize(
    ("given", "steps", "reached"),
    [(1000, 1000, 0.26), (0.25, 7, 10.0), (0.5, 14, 10.0), (0, 0, 10.0), (27, 27, 10 * 26 / 27), (4.0, 4, 10.0)],
)
def test_a_warm_up_is_steps_or_a_share_of_the_run(tmp_path, given, steps, reached):
    args = config(tmp_path, diversity_coef=10.0, diversity_warmup_steps=given)
    assert args.diversity_warmup(27) == steps
    assert args.diversity_coef_at(0, 27) == (0.0 if given else 10.0)
    assert args.diversity_coef_at(26, 27) == pytest.approx(reached)
    assert args.diversity_coef_at(13, 27) == diversity_coef_at(13, 10.0, steps)


def test_the_default_is_the_papers(tmp_path):
    assert config(tmp_path).diversity_warmup_steps == 1000


@pytest.mark.parametrize(("steps", "warned"), [(1000, True), (0.5, False), (2, False)])
def test_a_warm_up_longer_than_the_run_is_told_and_the_card_says_what_was_reached(
    tmp_path, tokenizer, caplog, steps, warned
):
    trainer = make_trainer(
        tmp_path, tokenizer, diversity_coef=10.0, diversity_warmup_steps=steps, max_steps=3,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    text = "ends with 0.02 of `diversity_coef=10`; give fewer, or a share of the run"
    assert (text in caplog.text) == warned
    trainer.save_model()
    reached = "0.02" if warned else "10"
    assert f"| diversity_coef reached | {reached} |" in (tmp_path / "README.md").read_text()
    assert trainer.state.log_history[-2]["diversity_coef"] == pytest.approx(float(reached))


@pytest.mark.parametrize(
    "given", [{"min_lr": "1e-5", "num_cycles": "2"}, '{"min_lr": "1e-5", "num_cycles": "2"}', {"min_lr": 1e-5}]
)
def test_texts_that_are_numbers_become_numbers_in_the_schedulers_settings(tmp_path, given):
    kwargs = config(tmp_path, lr_scheduler_kwargs=given).lr_scheduler_kwargs
    assert kwargs["min_lr"] == 1e-5 and isinstance(kwargs.get("num_cycles", 2), int)
    assert config(tmp_path, lr_scheduler_kwargs={"name": "cosine"}).lr_scheduler_kwargs == {"name": "cosine"}


@pytest.mark.parametrize(
    ("given", "expected"), [(True, "true"), (False, None), ("false", None), (None, None), ("a/checkpoint-1",) * 2]
)
def test_resuming_may_be_true_as_yaml_has_it(tmp_path, given, expected):
    assert config(tmp_path, resume_from_checkpoint=given).resume_from_checkpoint == expected


@pytest.mark.parametrize("name", ["eval_strategy", "logging_strategy", "save_strategy"])
def test_a_strategy_may_be_no_as_yaml_has_it(tmp_path, name):
    assert getattr(config(tmp_path, **{name: False}), name) == "no"


@pytest.mark.parametrize(("given", "warned"), [("None", True), (" null ", True), ("None of it", False), (None, False)])
def test_a_negative_prompt_that_is_called_none_is_told(tmp_path, caplog, given, warned):
    with caplog.at_level(logging.WARNING):
        config(tmp_path, negative_prompt=given)
    assert ("is taken literally as text; for the unconditional prompt" in caplog.text) == warned


def test_the_trainer_from_python_leaves_a_folder_that_says_what_it_is(tmp_path, tokenizer, model):
    """What the README's lines do: train, save."""
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: someone/first\n---\n")
    trainer = make_trainer(
        tmp_path / "out", tokenizer, model=str(base), max_steps=1, peft_config=LoraConfig(r=2), early_steps=2,
        early_guidance_scale=0.5,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= files
    assert "training_args.bin" not in files
    modes = [(tmp_path / "out" / name).stat().st_mode for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert modes[0] == modes[1], "a server of another user reads both"
    card = (tmp_path / "out" / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: mit\n" in header and "base_model: someone/first\n" in header
    assert (
        "base_model_relation: adapter\n" in header
        and "guidance 3 (0.5 in the first 2 steps) is in the weights" in card
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] and generation["top_k"] == 0 and str(tmp_path) not in card


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_the_last_checkpoint_is_the_model_as_evaluations_read_it(tmp_path, tokenizer, model, peft_config):
    """The same digest, so that a sweep that ends there is not sampled again; an adapter with its allowed tokens."""
    model.generation_config.suppress_tokens = [7]
    model.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", tokenizer, model=str(tmp_path / "base"), max_steps=2, peft_config=peft_config,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    first, last = (str(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2))
    assert content_digest(last) == content_digest(tmp_path / "out") != content_digest(first)
    assert suppressed_tokens([first]) == [7]
    if peft_config:  # as an earlier version left it
        (tmp_path / "out" / "checkpoint-1" / "generation_config.json").unlink()
        assert suppressed_tokens([first]) == [7]


def test_a_card_of_no_update_says_so(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "**Not trained**" in card and "is in the weights" not in card and "reached" not in card


def test_the_limit_of_the_diversitys_gradient_warms_up_with_its_coefficient(tmp_path):
    args = config(tmp_path, diversity_coef=10.0, diversity_warmup_steps=4, max_grad_norm_diversity=0.5)
    limits = [args.max_grad_norm_diversity_at(step, 100) for step in (0, 1, 4, 50)]
    assert limits == pytest.approx([0.0, 0.125, 0.5, 0.5])
    assert config(tmp_path, diversity_coef=10.0).max_grad_norm_diversity_at(50, 100) is None
    assert config(tmp_path, max_grad_norm_diversity=0.5).max_grad_norm_diversity_at(50, 100) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_grad_norm_diversity": 0.0}, r"`max_grad_norm_diversity` must be .* got 0.0"),
        ({"max_grad_norm_diversity": -1.0}, r"`max_grad_norm_diversity` must be .* got -1.0"),
        ({"max_grad_norm_diversity": 0.5, "fp16": True}, "does not work with the gradient scaler of `fp16=True`"),
        ({"diversity_hidden_states": True, "diversity_credit": "sequence"}, "set `diversity_credit='critic'`"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, diversity_coef=1.0, **given)


@pytest.mark.parametrize(
    ("given", "rates"), [({}, [0.0, 0.25, 0.5]), ({"lr_scheduler_type": "linear"}, [0, 0.25, 0.5])]
)
def test_a_warm_up_of_the_learning_rate_is_not_ignored(tmp_path, tokenizer, given, rates):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=3, warmup_steps=4, learning_rate=1.0, max_grad_norm=1e-9, embedder=None, **given
    )
    trainer.train()
    found = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert found == pytest.approx(rates)
    assert config(tmp_path).lr_scheduler_type == "constant"


@pytest.mark.parametrize("given", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_the_best_model_is_not_chosen_by_a_policy_gradient(tmp_path, tokenizer, given):
    given = given | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"goes by `metric_for_best_model=loss`.*set another metric"):
        make_trainer(tmp_path, tokenizer, eval_dataset=rows(), diversity_coef=1.0, **given)
    make_trainer(tmp_path, tokenizer, eval_dataset=rows(), embedder=None, diversity_coef=0.0, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"diversity_credit": "sequence"}, None),
        ({"gae_lambda": 0.7, "diversity_prefixes": 39}, None),
        ({"diversity_credit": "sequence", "gae_lambda": 0.7}, "`gae_lambda=0.7` are settings of the critic"),
        (
            {"diversity_credit": "sequence", "gae_lambda": 0.7, "diversity_prefixes": 39},
            "`gae_lambda=0.7` and `diversity_prefixes=39` are settings of the critic, and not used with",
        ),
    ],
)
def test_settings_of_a_critic_that_there_is_not_are_told(tmp_path, caplog, given, told):
    with caplog.at_level(logging.WARNING):
        CFGDistillDiversityConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert (told or "") in caplog.text and ("settings of the critic" in caplog.text) == (told is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_trained_in_half_precision_are_told(tmp_path, tokenizer, model, caplog, dtype):
    make_trainer(tmp_path, tokenizer, model.to(dtype), embedder=None, diversity_coef=0.0)
    assert ("tensors are trained in bfloat16" in caplog.text) == (dtype == torch.bfloat16)


def test_completions_that_cross_the_limit_of_a_long_rotary_embedding_are_refused(tmp_path, tokenizer):
    """Their earlier tokens are sampled with the short factors and scored with the long ones."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    long = make_model(tokenizer, max_position_embeddings=64, rope_parameters=rope)
    with pytest.raises(ValueError, match="exceed the 16 positions up to which this model has short rotary factors"):
        make_trainer(tmp_path, tokenizer, long, embedder=None, diversity_coef=0.0, max_completion_length=20)
    make_trainer(tmp_path, tokenizer, long, embedder=None, diversity_coef=0.0, max_completion_length=4)


def test_a_share_as_the_warm_up_is_not_told_to_be_a_share(tmp_path, tokenizer, caplog):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, diversity_coef=10.0, diversity_warmup_steps=0.3)
    trainer.train()
    assert "0.3` of a run of `max_steps=1` is 1: it ends with 0 of `diversity_coef=10`; give more steps" in caplog.text


def test_prompts_that_are_texts_are_told_where_the_model_has_a_chat_template(tmp_path, tokenizer, model, caplog):
    make_trainer(tmp_path / "plain", tokenizer, model, embedder=None, diversity_coef=0.0)
    assert "without its chat template" not in caplog.text
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{{ messages[0]['content'] }}"
    make_trainer(tmp_path / "chat", chat, model, embedder=None, diversity_coef=0.0)
    assert "prompts that are texts, which this model continues without its chat template" in caplog.text


def test_a_run_whose_warm_up_was_ignored_goes_on_and_one_of_another_schedule_does_not():
    """`constant` with `warmup_steps` had no warm-up in earlier versions, and is `constant_with_warmup` now."""
    now = {"lr_scheduler_type": "constant_with_warmup", "seed": "0"}
    assert identity_problem({"lr_scheduler_type": "constant", "seed": "0"}, now) is None
    assert "`lr_scheduler_type` linear instead of" in str(identity_problem({"lr_scheduler_type": "linear"}, now))
    assert "`seed` 1 instead of 0" in str(identity_problem(now | {"seed": "1"}, now))
