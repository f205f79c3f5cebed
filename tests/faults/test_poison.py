"""NaN, infinity and exceptions, wherever they come from, never reach the weights, and are named."""

import logging
import re

import pytest
import torch
from transformers import TrainerCallback
from worlds import bag_of_words, make_trainer, weights

from trl_drcd import CFGDistillDiversityConfig, DiversityReward
from trl_drcd.reliability.batches import BadBatchError
from trl_drcd.reliability.checkpoints import checkpoints, why_incomplete
from trl_drcd.reliability.guard import SKIPPED_IN_A_ROW

SHORT = {
    "max_steps": 4, "num_iterations": 1, "eval_strategy": "no", "save_steps": 100, "max_completion_length": 4,
    "logging_steps": 10,
}  # fmt: skip


class Poison(TrainerCallback):
    """Is on while the third update is made; keeps the weights after each."""

    def __init__(self):
        self.on, self.after, self.always = False, [], False

    def on_step_begin(self, args, state, control, **kwargs):
        self.on = self.always or state.global_step == 2

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    def reward(self, value):
        def length(prompts, completions, **kwargs):
            rewards = [float(len(c)) for c in completions]
            return [*rewards[:-1], value] if self.on else rewards

        return {"reward_funcs": [length]}

    def raising_reward(self):
        def judge(completions, **kwargs):
            if self.on:
                raise ConnectionError("no answer")
            return [1.0] * len(completions)

        return {"reward_funcs": [judge]}

    def embedder(self, change):
        return {"embedder": lambda texts: change(bag_of_words(texts)) if self.on else bag_of_words(texts)}

    def hooked(self, find, when=lambda: True):
        """NaN in the first row of the output of the module that `find` gives of the trainer."""

        def hook(module, args, output):
            if self.on and when():
                output = output.clone()
                output[0] = torch.nan
            return output

        return lambda trainer: find(trainer).register_forward_hook(hook)

    def gradient(self, trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: torch.full_like(grad, torch.inf) if self.on else grad)


def set_row(row, value):
    def change(embeddings):
        embeddings[row] = value
        return embeddings

    return change


def unreachable(embeddings):
    raise TimeoutError("the embedding service does not answer")


PROMPT = r" for the prompt '(a |slow|fast|tune| )+(<audio>)?'"
# name: (keywords of the trainer, what is done to it, what the message says)
POISONS = {
    "reward NaN": (lambda p: p.reward(float("nan")), None, f"the reward `length` is nan{PROMPT}"),
    "reward -inf": (lambda p: p.reward(float("-inf")), None, f"the reward `length` is -inf{PROMPT}"),
    "reward raises": (lambda p: p.raising_reward(), None, "the reward `judge` raised ConnectionError: no answer"),
    "embedding NaN": (lambda p: p.embedder(set_row(1, torch.nan)), None, f"no direction .*{PROMPT}"),
    "embedding zero": (lambda p: p.embedder(set_row(1, 0.0)), None, f"no direction .*{PROMPT}"),
    "embedder raises": (lambda p: p.embedder(unreachable), None, "the embedder raised TimeoutError: the embedding"),
    "teacher": (
        lambda p: {},
        lambda p: p.hooked(lambda trainer: trainer.teacher.copy.model.norm),
        f"the KL to the teacher is not finite, so its logits are not,{PROMPT}",
    ),
    "student in the loss": (
        lambda p: {},
        lambda p: p.hooked(lambda trainer: trainer.model.model.norm, torch.is_grad_enabled),
        f"the student's logits are not finite{PROMPT}",
    ),
    "student that samples": (
        lambda p: {},
        lambda p: p.hooked(lambda trainer: trainer.model.model.norm, lambda: not torch.is_grad_enabled()),
        f"the student's logits are not finite while it samples{PROMPT}",
    ),
    "gradient": (lambda p: {}, lambda p: p.gradient, "the norm of the gradient is (nan|inf)"),
}


def poisoned(tmp_path, name, **changed):
    poison = Poison()
    keywords, change, message = POISONS[name]
    trainer = make_trainer("text", tmp_path, callbacks=[poison], **(SHORT | keywords(poison) | changed))
    if change is not None:
        change(poison)(trainer)
    return trainer, poison, message


@pytest.mark.parametrize("name", POISONS)
def test_it_stops_with_a_checkpoint_of_the_last_good_state(tmp_path, name):
    trainer, _, message = poisoned(tmp_path, name)
    with pytest.raises(BadBatchError, match=f"After 2 updates: .*{message}") as raised:
        trainer.train()
    assert (
        f"{tmp_path / 'checkpoint-2'}: `resume_from_checkpoint=True` goes on from there; `on_bad_batch='skip'`"
        in str(raised.value)
    )
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert why_incomplete(tmp_path / "checkpoint-2") is None
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", ["reward NaN", "gradient"])
def test_without_the_poison_the_run_ends_as_if_nothing_had_been(tmp_path, name):
    """Before the rollout, or after it and both forwards: the checkpoint has the random states of before."""
    trainer, _, _ = poisoned(tmp_path / "stopped", name)
    with pytest.raises(BadBatchError):
        trainer.train()
    for folder, resume in ((tmp_path / "clean", None), (tmp_path / "stopped", True)):
        trainer, poison, _ = poisoned(folder, name)
        poison.on_step_begin = lambda *args, **kwargs: None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "clean")


@pytest.mark.parametrize("name", POISONS)
def test_it_leaves_the_update_out(tmp_path, name, caplog):
    trainer, poison, message = poisoned(tmp_path, name, on_bad_batch="skip")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = [r.message for r in caplog.records if "is skipped" in r.message]
    assert len(lines) == 1 and re.search(rf"Update 3 is skipped \(`on_bad_batch='skip'`\): .*{message}", lines[0])
    assert len(poison.after) == 4
    for parameter in poison.after[0]:
        steps = [weights_after[parameter] for weights_after in poison.after]
        assert torch.equal(steps[1], steps[2]) and all(step.isfinite().all() for step in steps)
    assert any(not torch.equal(poison.after[2][n], poison.after[3][n]) for n in poison.after[3])


def test_a_run_that_learns_nothing_ends(tmp_path):
    trainer, poison, _ = poisoned(tmp_path, "reward raises", on_bad_batch="skip", max_steps=50)
    poison.always = True
    message = rf"After {SKIPPED_IN_A_ROW} updates: {SKIPPED_IN_A_ROW} updates in a row were skipped, and again the"
    with pytest.raises(BadBatchError, match=message):
        trainer.train()


def test_a_rollout_of_several_updates_is_not_used_again(tmp_path):
    """The second of three updates that one rollout serves is bad: the third samples anew."""
    trainer, poison, _ = poisoned(tmp_path, "gradient", on_bad_batch="skip", num_iterations=3)
    rollouts, sample = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: rollouts.append(trainer.state.global_step) or sample(rows)
    poison.on_step_begin = lambda args, state, control, **kwargs: setattr(poison, "on", state.global_step == 1)
    trainer.train()
    assert rollouts == [0, 2, 3]


def test_none_is_no_nan(tmp_path):
    def sometimes(completions, **kwargs):
        return [None, *[1.0] * (len(completions) - 1)]

    trainer = make_trainer("text", tmp_path, reward_funcs=[sometimes], **(SHORT | {"max_steps": 1}))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_group_of_identical_completions_is_learned_from(tmp_path):
    """Its diversity is 0 and so is each advantage: no poison."""
    trainer = make_trainer("text", tmp_path, embedder=lambda texts: torch.ones(len(texts), 3), **SHORT)
    trainer.train()
    assert [entry["diversity"] for entry in trainer.state.log_history if "diversity" in entry] == [
        pytest.approx(0, abs=1e-6)
    ]
    assert trainer.state.global_step == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_reward_names_the_prompt():
    reward = DiversityReward(lambda texts: set_row(1, 0.0)(bag_of_words(texts)), 2)
    with pytest.raises(BadBatchError, match=r"no direction .* for the prompt 'slow'"):
        reward(["fast", "slow"], ["tune", "tune"], [[1], [2]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"on_bad_batch": "ignore"}, r"`on_bad_batch` must be 'stop' or 'skip', got 'ignore'"),
        ({"on_bad_batch": "skip", "fp16": True, "bf16": False}, "gradient scaler of `fp16=True`"),
        ({"ddp_timeout": 0}, "`ddp_timeout` must be at least 1, got 0"),
    ],
)
def test_what_the_configuration_refuses(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        CFGDistillDiversityConfig(str(tmp_path), **changed)
