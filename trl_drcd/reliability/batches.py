"""Detect bad batches (non-finite values, failing reward functions) and report them on all processes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn

from trl_drcd.reliability.processes import report_status

SHOWN = 4  # maximum number of problems listed in a message


class BadBatchError(ValueError):
    """A reward, the embedder, the teacher or the student returned a non-finite value or raised."""


class Problems:
    """Problems of the current batch on this process; `cause` is the first exception."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.cause: BaseException | None = None

    def add(self, *texts: str, cause: BaseException | None = None) -> None:
        """Add problems; each text gives the problem and the prompt."""
        self.texts.extend(texts)
        self.cause = self.cause or cause

    def clear(self) -> None:
        """Remove all problems, before the next batch."""
        self.texts, self.cause = [], None

    def raise_together(self) -> None:
        """Raise on every process if any process has a problem; see [`raise_together`]."""
        raise_together(self.texts, self.cause)


def raise_together(problems: list[str], cause: BaseException | None = None) -> None:
    """
    Raise on every process if any process has a problem. Without problems, only one number is communicated.

    Args:
        problems (`list[str]`): Problems of this process, each with its prompt.
        cause (`BaseException`, *optional*): Exception raised on this process.

    Raises:
        BadBatchError: If there is a problem on any process; lists the problems of all.
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
    """One problem for each bad row: `bad` is boolean of shape `(b,)`, `prompts` has one entry per row."""
    return [what + for_prompt(prompts[row]) for row in bad.nonzero().flatten().tolist()]


def for_prompt(prompt: Any) -> str:
    """The start of a prompt, as the last part of a problem's text."""
    return f" for the prompt {str(prompt)[:80]!r}"


def checked_reward(reward: Callable, problems: Problems) -> Callable:
    """
    Wrap a reward function so that exceptions and non-finite values are added to `problems`.

    `None` keeps its meaning in TRL: the function does not apply to that completion.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    def checked(prompts: list, values: Any) -> list:
        values = [None if value is None else float(value) for value in values]
        if len(values) != len(prompts):
            return values  # TRL raises the error for a wrong length
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

    from trl_drcd.compat.trl_private import is_async_callable  # TRL takes seconds to import

    if is_async_callable(reward):

        async def call_async(prompts: list, **kwargs: object) -> list:
            try:
                return checked(prompts, await reward(prompts=prompts, **kwargs))
            except Exception as error:
                return failed(prompts, error)

        return call_async

    def call(prompts: list, **kwargs: object) -> list:
        try:
            return checked(prompts, reward(prompts=prompts, **kwargs))
        except Exception as error:
            return failed(prompts, error)

    return call


@contextmanager
def finite_sampling(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """
    Replace non-finite outputs of `module` by zeros, so that sampling is uniform there, and record the rows.

    On a GPU, sampling from NaN would crash the process without naming the prompt.

    Args:
        module (`nn.Module`): Returns logits `(b, ..., V)`, or an output with `last_hidden_state` `(b, ..., H)`.

    Yields:
        `list[torch.Tensor]`: Filled on exit: boolean, shape `(b,)` each, True for rows with non-finite values.
    """
    seen: dict[int, torch.Tensor] = {}

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        logits = isinstance(output, torch.Tensor)
        values: torch.Tensor = output if logits else output.last_hidden_state
        # A logit may be -inf, unless all of the row are
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
