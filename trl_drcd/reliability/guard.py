"""RLOO that does not learn from what is not finite: it stops before, with a checkpoint, or leaves the update out."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trl_drcd.reliability.batches import BadBatchError, about_rows, guarded, raise_together, sampled_from_finite_values
from trl_drcd.reliability.processes import doing, limit_waiting, lost_the_others, what_others_did
from trl_drcd.reliability.resume import ResumableRLOOTrainer

logger = logging.getLogger(__name__)

LEFT_OUT_IN_A_ROW = 10  # updates; a run that learns nothing must not go on for days


class GuardedRLOOTrainer(ResumableRLOOTrainer):
    """
    RLOO that looks whether rewards, embeddings, losses and gradients are finite before an update.

    All processes find out together. With `on_bad_batch="stop"` the state before the update becomes a checkpoint, down
    to the random states, and a `BadBatchError` says what was wrong with which prompt; with `"skip"` weights and
    the state of the optimizer stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        limit_waiting(self.args.ddp_timeout)
        if self.is_deepspeed_enabled and self.args.on_bad_batch == "skip":
            raise ValueError("`on_bad_batch='skip'` does not go with DeepSpeed, which updates by itself; set 'stop'")
        self._problems: list[str] = []  # of this process in this rollout
        self._good: dict[str, Any] | None = None  # what else a checkpoint after the last update would hold
        self._left_out: int | None = None  # the last update that was
        self._in_a_row = 0
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else guarded(reward, self._problems)
            for reward in self.reward_funcs
        ]

    # ---------------------------------------------------------------- finding out

    @contextmanager
    def _watched_sampling(self, prompt_ids: list[list[int]]) -> Iterator[None]:
        """Remembers for which prompts the student's logits were not finite."""
        student = self.accelerator.unwrap_model(self.model)
        doing("it samples")
        with sampled_from_finite_values(self.policy.sampled_from(student)) as found:
            yield
        doing("it has sampled")
        for rows in found:
            what = "the student's logits are not finite while it samples"
            if rows.any():
                known = len(rows) == len(prompt_ids)
                self._problems += about_rows(what, rows, self._decoded(prompt_ids)) if known else [what]

    def _decoded(self, prompt_ids: Any) -> list[str]:
        return self._tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        doing("it computes rewards")
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            start = self.accelerator.process_index * len(prompts)
            own = rewards[start : start + len(prompts)]
            for number, (name, reward) in enumerate(zip(self.reward_func_names, self.reward_funcs, strict=True)):
                if isinstance(reward, nn.Module):
                    what = f"the reward `{name}` is not finite"
                    self._problems += about_rows(what, ~own[:, number].isfinite(), prompts)
            raise_together(self._problems)
        finally:
            self._problems.clear()
        return rewards

    def _check_losses(self, losses: torch.Tensor, inputs: dict[str, Any], terms: Any) -> None:
        """
        Raises before the backward pass if a loss is not finite, in every process.

        Args:
            losses (`torch.Tensor`): Of all processes.
            inputs (`dict`): The batch of this process.
            terms ([`~trl_drcd.losses.TokenTerms`]): Of this process: KL, log-probability and entropy of each sequence.
        """
        doing("it updates")
        if losses.isfinite().all():
            return
        student = ~(terms.entropy.isfinite() & terms.log_probs.isfinite())
        rest = {
            "the student's logits are not finite": student,
            "the KL to the teacher is not finite, so its logits are not,": ~student & ~terms.kl.isfinite(),
            "the advantage is not finite": ~(inputs["advantages"] + inputs["diversity_advantages"]).isfinite(),
        }
        prompts = self._decoded(inputs["prompt_ids"])
        problems = [problem for what, rows in rest.items() for problem in about_rows(what, rows, prompts)]
        raise_together(problems)
        raise BadBatchError("the loss is not finite")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is None or self.args.fp16 or math.isfinite(grad_norm):
            return grad_norm
        message = f"the norm of the gradient is {float(grad_norm)}, although the losses are finite"
        if self.is_deepspeed_enabled:
            raise FloatingPointError(f"{message}; DeepSpeed has updated by it: resume from an older checkpoint")
        if self.args.on_bad_batch == "stop":
            raise BadBatchError(message)
        self._leave_out(message)
        return 0.0

    # ---------------------------------------------------------------- what follows

    def training_step(self, model, inputs, num_items_in_batch):
        if self._left_out != self.state.global_step:
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except BadBatchError as error:
                if self.args.on_bad_batch == "stop":
                    raise
                self._leave_out(str(error))
        self._step += 1
        return torch.zeros((), device=self.args.device)

    def _leave_out(self, problem: str) -> None:
        """Without gradients the optimizer changes neither weights nor its state; the rollout is not used again."""
        step = self.state.global_step
        self._in_a_row = self._in_a_row + 1 if self._left_out == step - 1 else 1
        self._left_out = step
        self.model.zero_grad(set_to_none=True)
        self._buffered_inputs = None
        if self._in_a_row > LEFT_OUT_IN_A_ROW:
            raise BadBatchError(f"{LEFT_OUT_IN_A_ROW} updates in a row were left out, and again {problem}")
        if self.accelerator.is_main_process:
            logger.warning(f"Update {step + 1} is left out (`on_bad_batch='skip'`): {problem}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a batch that stops it leaves a checkpoint of the state before; a process that is lost is named."""
        try:
            return super().train(*args, **kwargs)
        except BadBatchError as error:
            done = self.state.global_step
            remedy = "" if self.args.on_bad_batch == "skip" else "; `on_bad_batch='skip'` leaves such updates out"
            raise BadBatchError(f"After {done} updates: {error}. {self._keep_good_state()}{remedy}") from error
        except RuntimeError as error:
            if not lost_the_others(error):
                raise
            raise RuntimeError(
                f"After {self.state.global_step} updates, process {self.accelerator.process_index} has lost another "
                f"process, which ended or did not answer for {self.args.ddp_timeout} s (`ddp_timeout`). What each did "
                f"last: {what_others_did()}. `resume_from_checkpoint=True` goes on from the newest checkpoint"
            ) from error

    def _keep_good_state(self) -> str:
        """Makes a checkpoint of the state after the last update, unless there is one; where it is."""
        step = self.state.global_step
        if self._saved_step != step:
            if self.args.save_strategy == "no":
                return "Nothing is saved, as `save_strategy='no'` says"
            if self._good is not None and self._good["global_step"] == step:
                self._step, self._buffered_inputs = self._good["step"], self._good["buffered"]
                _set_random_states(self._good["random"])
            self._save_checkpoint(self.model, None)
        if step == 0:
            return "Nothing was learned before"
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        return f"The state before is in {folder}: `resume_from_checkpoint=True` goes on from there"

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.logging_strategy == "no":
            self._metrics["train"].clear()  # what a log would have emptied
        self._good = {
            "global_step": self.state.global_step,
            "step": self._step,
            "buffered": self._buffered_inputs,
            "random": _random_states(),
        }


def _random_states() -> tuple:
    """Of Python, NumPy, torch, and the GPU that this process uses."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _set_random_states(states: tuple) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])
