"""The guard against bad batches: stop before an update that is not finite, or skip it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trl_drcd.reliability.batches import BadBatchError, Problems, checked_reward, finite_sampling, row_problems
from trl_drcd.reliability.processes import report_status

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 10  # updates; a run that learns nothing must not go on for days


class BatchGuard:
    """
    Finds out whether rewards, embeddings, losses and gradients are finite before an update, on all processes together.

    Args:
        on_bad_batch (`str`): `"stop"` or `"skip"`.
        tokenizer: Decodes the prompts that messages name.
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(self, on_bad_batch: str, tokenizer: Any, accelerator: Accelerator) -> None:
        self.on_bad_batch, self.tokenizer, self.accelerator = on_bad_batch, tokenizer, accelerator
        self.problems = Problems()  # of this process in this rollout
        self.skipped_step: int | None = None  # the last update that was
        self.in_a_row = 0

    # ---------------------------------------------------------------- finding out

    @contextmanager
    def watched_sampling(self, module: nn.Module, prompt_ids: list[list[int]]) -> Iterator[None]:
        """Remembers for which prompts the output of `module`, which TRL samples from, was not finite."""
        report_status("it samples")
        with finite_sampling(module) as found:
            yield
        report_status("it has sampled")
        for rows in found:
            self.note_not_finite(rows, prompt_ids)

    def note_not_finite(self, rows: torch.Tensor, prompt_ids: list[list[int]]) -> None:
        """Remembers the prompts of the rows `(b,)` that were sampled from logits which are not finite."""
        what = "the student's logits are not finite while it samples"
        if rows.any():
            known = len(rows) == len(prompt_ids)
            self.problems.add(*(row_problems(what, rows, self._decoded(prompt_ids)) if known else [what]))

    def _decoded(self, prompt_ids: Any) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        return texts

    def checked_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """Reward functions that report instead of raising; reward models as they are."""
        return [
            reward if isinstance(reward, nn.Module) else checked_reward(reward, self.problems)
            for reward in reward_funcs
        ]

    @contextmanager
    def watched_rewards(self) -> Iterator[Problems]:
        """Raises at the end, in every process, what the body and the sampling before it have found."""
        report_status("it computes rewards")
        try:
            yield self.problems
            self.problems.raise_together()
        finally:
            self.problems.clear()

    def check_model_rewards(self, names: list[str], reward_funcs: list[Any], rewards: torch.Tensor, prompts: list):
        """Reports what reward models gave for the rows of this process, `rewards (b, n)`, that is not finite."""
        for number, (name, reward) in enumerate(zip(names, reward_funcs, strict=True)):
            if isinstance(reward, nn.Module):
                what = f"the reward `{name}` is not finite"
                self.problems.add(*row_problems(what, ~rewards[:, number].isfinite(), prompts))

    def check_losses(self, means: torch.Tensor, rows: dict[str, torch.Tensor], prompt_ids: torch.Tensor) -> None:
        """
        Raises before the backward pass if a loss is not finite, in every process.

        Args:
            means (`torch.Tensor`): Losses, means over all processes.
            rows (`dict`): Of each sequence of this process, `(b,)`: `student` (entropy and log-probability), `kl` and
                `advantages`.
            prompt_ids (`torch.Tensor`): Of this process, `(b, P)`.
        """
        report_status("it updates")
        if means.isfinite().all():
            return
        student = ~rows["student"].isfinite()
        rest = {
            "the student's logits are not finite": student,
            "the KL to the teacher is not finite, so its logits are not,": ~student & ~rows["kl"].isfinite(),
            "the advantage is not finite": ~rows["advantages"].isfinite(),
        }
        prompts, problems = self._decoded(prompt_ids), Problems()
        for what, bad in rest.items():
            problems.add(*row_problems(what, bad, prompts))
        problems.raise_together()
        raise BadBatchError("the loss is not finite")

    def gradient_problem(self, grad_norm: Any, fp16: bool, deepspeed: bool) -> str | None:
        """
        What is wrong with the gradient's norm, if anything is; with `fp16` the scaler finds out.

        Raises:
            FloatingPointError: Under DeepSpeed, which has updated by it.
        """
        if grad_norm is None or fp16 or math.isfinite(grad_norm):
            return None
        message = f"the norm of the gradient is {float(grad_norm)}, although the losses are finite"
        if deepspeed:
            raise FloatingPointError(f"{message}; DeepSpeed has updated by it: resume from an older checkpoint")
        return message

    # ---------------------------------------------------------------- what follows

    def skips(self, step: int) -> bool:
        """Whether the update after `step` others is skipped: the rest of its forwards need not run."""
        return self.skipped_step == step

    def skip(self, step: int, problem: BadBatchError) -> None:
        """
        Skips the update after `step` others.

        Raises:
            BadBatchError: With `on_bad_batch="stop"`, or if too many updates in a row are bad.
        """
        if self.on_bad_batch == "stop":
            raise problem
        self.in_a_row = self.in_a_row + 1 if self.skipped_step == step - 1 else 1
        self.skipped_step = step
        if self.in_a_row > SKIPPED_IN_A_ROW:
            raise BadBatchError(f"{SKIPPED_IN_A_ROW} updates in a row were left out, and again {problem}") from problem
        if self.accelerator.is_main_process:
            logger.warning(f"Update {step + 1} is left out (`on_bad_batch='skip'`): {problem}")
