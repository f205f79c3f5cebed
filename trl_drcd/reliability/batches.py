"""Batches that must not be learned from: what is wrong, with which prompt, agreed upon by all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn

from trl_drcd.compat.trl_private import is_async_callable
from trl_drcd.reliability.processes import report_status

SHOWN = 4  # problems that a message names


class BadBatchError(ValueError):
    """A reward, an embedder, the teacher or the student gave what cannot be learned from."""


class Problems:
    """What is wrong with the batch at hand on this process; `cause` is the first exception among it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.cause: BaseException | None = None

    def add(self, *texts: str, cause: BaseException | None = None) -> None:
        """Each text says what is wrong, with which prompt."""
        self.texts.extend(texts)
        self.cause = self.cause or cause

    def clear(self) -> None:
        """Before the next batch."""
        self.texts, self.cause = [], None

    def raise_together(self) -> None:
        """Raises in every process if any process has a problem; see [`raise_together`]."""
        raise_together(self.texts, self.cause)


def raise_together(problems: list[str], cause: BaseException | None = None) -> None:
    """
    Raises in every process if any process has a problem; one number is exchanged where none has.

    Args:
        problems (`list[str]`): Of this process; each says what is wrong with which prompt.
        cause (`BaseException`, *optional*): What was raised in this process.

    Raises:
        BadBatchError: With the problems of all processes.
    """
    state = PartialState()
    if state.num_processes > 1:
        report_status("it waits for the others' rewards")
        count = reduce(torch.tensor(len(problems), device=state.device), reduction="sum")
        problems = gather_object(problems) if count else []
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise BadBatchError("; ".join(problems[:SHOWN]) + more) from cause


def row_problems(what: str, bad: torch.Tensor, prompts: list) -> list[str]:
    """One problem for each row that is bad: `bad` has shape `(b,)`, `prompts` are those of the rows."""
    return [what + for_prompt(prompts[row]) for row in bad.nonzero().flatten().tolist()]


def for_prompt(prompt: Any) -> str:
    """The beginning of a prompt, as it stands at the end of a problem."""
    return f" for the prompt {str(prompt)[:80]!r}"


def checked_reward(reward: Callable, problems: Problems) -> Callable:
    """
    The reward function, which adds to `problems` instead of raising or of giving NaN or an infinite value.

    `None` stays what it is for TRL: this function does not judge that completion.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    def checked(prompts: list, values: Any) -> list:
        values = [None if value is None else float(value) for value in values]
        if len(values) != len(prompts):
            return values  # TRL says so
        problems.add(
            *(
                f"the reward `{name}` is {value}{for_prompt(prompt)}"
                for value, prompt in zip(values, prompts, strict=True)
                if value is not None and not math.isfinite(value)
            )
        )
        return values

    def failed(prompts: list, error: Exception) -> list:
        problems.add(f"the reward `{name}` raised {type(error).__name__}: {error}", cause=error)
        return [0.0] * len(prompts)

    if is_async_callable(reward):

        async def call_async(prompts: list, **kwargs: Any) -> list:
            try:
                return checked(prompts, await reward(prompts=prompts, **kwargs))
            except Exception as error:
                return failed(prompts, error)

        return call_async

    def call(prompts: list, **kwargs: Any) -> list:
        try:
            return checked(prompts, reward(prompts=prompts, **kwargs))
        except Exception as error:
            return failed(prompts, error)

    return call


@contextmanager
def finite_sampling(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """
    While it lasts, sequences whose logits are not finite are sampled from uniformly, and remembered.

    On a GPU sampling from them would end the process without naming them.

    Args:
        module (`nn.Module`): Gives logits `(b, ..., V)`, or an output with `last_hidden_state` `(b, ..., H)`.

    Yields:
        `list[torch.Tensor]`: In the end, boolean, shape `(b,)` each: of which rows values were not finite.
    """
    seen: dict[int, torch.Tensor] = {}

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        logits = isinstance(output, torch.Tensor)
        values: torch.Tensor = output if logits else output.last_hidden_state
        # Of logits -inf is as good as another value, unless all are
        wrong = ~(values if logits else values.abs()).amax(-1, keepdim=True).isfinite()
        rows = wrong.flatten(1).any(1)
        seen[len(rows)] = seen.get(len(rows), False) | rows
        values = values.masked_fill(wrong, 0.0)
        if logits:
            return values
        output.last_hidden_state = values
        return output

    hook = module.register_forward_hook(replace)
    found: list[torch.Tensor] = []
    try:
        yield found
    finally:
        hook.remove()
        found.extend(seen.values())
