"""The guard against bad batches: stop before a non-finite update, or skip it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trl_drcd.losses import BatchTerms
from trl_drcd.reliability.batches import BadBatchError, Problems, checked_reward, finite_sampling, row_problems
from trl_drcd.reliability.processes import report_status

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 10  # updates; then the run stops, as it no longer learns anything


class BatchGuard:
    """
    Check that rewards, embeddings, losses and gradients are finite before an update, on all processes together.

    Args:
        on_bad_batch (`str`): `"stop"` or `"skip"`.
        tokenizer: Decodes prompts for error messages.
        accelerator (`Accelerator`): The trainer's accelerator.
    """

    def __init__(self, on_bad_batch: str, tokenizer: Any, accelerator: Accelerator) -> None:
        self.on_bad_batch, self.tokenizer, self.accelerator = on_bad_batch, tokenizer, accelerator
        self.problems = Problems()  # of this process and rollout
        self.skipped_step: int | None = None  # the last skipped update
        self.in_a_row = 0

    # ---------------------------------------------------------------- detection

    @contextmanager
    def watched_sampling(self, module: nn.Module, prompt_ids: list[list[int]]) -> Iterator[None]:
        """Record the prompts for which the output of `module`, which TRL samples from, is not finite."""
        report_status("it samples")
        with finite_sampling(module) as found:
            yield
        report_status("it has sampled")
        for rows in found:
            self.note_not_finite(rows, prompt_ids)

    def note_not_finite(self, rows: torch.Tensor, prompt_ids: list[list[int]]) -> None:
        """Record the prompts of the rows, boolean `(b,)`, that were sampled from non-finite logits."""
        what = "the student's logits are not finite while it samples"
        if rows.any():
            known = len(rows) == len(prompt_ids)
            self.problems.add(*(row_problems(what, rows, self._decoded(prompt_ids)) if known else [what]))

    def _decoded(self, prompt_ids: Any) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        return texts

    def checked_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """Wrap reward functions so that they report problems instead of raising; reward models are unchanged."""
        return [
            reward if isinstance(reward, nn.Module) else checked_reward(reward, self.problems)
            for reward in reward_funcs
        ]

    @contextmanager
    def watched_rewards(self) -> Iterator[Problems]:
        """On exit, raise the problems of the body and of the preceding sampling, on every process."""
        report_status("it computes rewards")
        try:
            yield self.problems
            self.problems.raise_together()
        finally:
            self.problems.clear()

    def check_model_rewards(
        self, names: list[str], reward_funcs: list[Any], rewards: torch.Tensor, prompts: list
    ) -> None:
        """
        Record non-finite rewards of reward models.

        Args:
            names, reward_funcs (`list`): The `n` reward functions; those that are no models report for themselves.
            rewards (`torch.Tensor`): Of all processes, `(B, n)`.
            prompts (`list`): Of this process, `b` of them.
        """
        start = self.accelerator.process_index * len(prompts)
        own = rewards[start : start + len(prompts)]
        for number, (name, reward) in enumerate(zip(names, reward_funcs, strict=True)):
            if isinstance(reward, nn.Module):
                what = f"the reward `{name}` is not finite"
                self.problems.add(*row_problems(what, ~own[:, number].isfinite(), prompts))

    def check_losses(
        self, means: torch.Tensor, terms: BatchTerms, credits: dict[str, torch.Tensor], prompt_ids: torch.Tensor
    ) -> None:
        """
        Raise before the backward pass, on every process, if a loss is not finite.

        Args:
            means (`torch.Tensor`): Losses, averaged over all processes.
            terms ([`~trl_drcd.losses.BatchTerms`]): Of the `b` sequences of this process.
            credits (`dict[str, torch.Tensor]`): Their weighted advantages by term, `(b, 1, 1)` or `(b, S, K)`.
            prompt_ids (`torch.Tensor`): Their prompts, int64 `(b, P)`.

        Raises:
            BadBatchError: If a loss is not finite.
        """
        report_status("it updates")
        if means.isfinite().all():
            return
        student = ~(terms.entropy + terms.log_probs.detach().sum((1, 2))).isfinite()
        advantages: torch.Tensor = sum(credit.sum((1, 2)) for credit in credits.values())  # type: ignore[assignment]
        rest = {
            "the student's logits are not finite": student,
            "the KL to the teacher is not finite, so its logits are not,": ~student & ~terms.kl.isfinite(),
            "the advantage is not finite": ~advantages.isfinite(),
        }
        prompts, problems = self._decoded(prompt_ids), Problems()
        for what, bad in rest.items():
            problems.add(*row_problems(what, bad, prompts))
        problems.raise_together()
        raise BadBatchError("the loss is not finite")

    def gradient_problem(self, grad_norm: Any, fp16: bool, deepspeed: bool) -> BadBatchError | None:
        """
        A problem if the gradient norm is not finite, else `None`. With `fp16` the gradient scaler handles it.

        Raises:
            FloatingPointError: With DeepSpeed, which has already applied the update.
        """
        if grad_norm is None or fp16 or math.isfinite(grad_norm):
            return None
        message = f"the norm of the gradient is {float(grad_norm)}, although the losses are finite"
        if deepspeed:
            raise FloatingPointError(f"{message}; DeepSpeed has applied it: resume from an older checkpoint")
        return BadBatchError(message)

    # ---------------------------------------------------------------- skipping

    def guarded(
        self, step: int, forward: Callable[[], torch.Tensor], drop_update: Callable[[], None]
    ) -> torch.Tensor | None:
        """
        The loss of a forward and backward pass; `None` if it is bad, or an earlier one of its update was, and skipped.

        Args:
            step (`int`): Number of updates before this one.
            forward (`Callable`): Returns the loss.
            drop_update (`Callable`): Forgets the gradients and the rollout of the update.

        Raises:
            BadBatchError: See [`skip`].
        """
        if self.skipped_step == step:
            return None
        try:
            return forward()
        except BadBatchError as error:
            self.skip(step, error, drop_update)
        return None

    def skip(self, step: int, problem: BadBatchError, drop_update: Callable[[], None]) -> None:
        """
        Skip the update after `step` others; see [`guarded`].

        Raises:
            BadBatchError: With `on_bad_batch="stop"`, or after more than `SKIPPED_IN_A_ROW` bad updates in a row.
        """
        if self.on_bad_batch == "stop":
            raise problem
        self.in_a_row = self.in_a_row + 1 if self.skipped_step == step - 1 else 1
        self.skipped_step = step
        if self.in_a_row > SKIPPED_IN_A_ROW:
            raise BadBatchError(f"{SKIPPED_IN_A_ROW} updates in a row were skipped, and again {problem}") from problem
        if self.accelerator.is_main_process:
            logger.warning(f"Update {step + 1} is skipped (`on_bad_batch='skip'`): {problem}")
        drop_update()
