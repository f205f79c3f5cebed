"""What the trainer measures of an update, over all processes: means of its terms, norms of their gradients, times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from trl_drcd.distributed import is_sharded


class RunningMeans:
    """
    Means of the loss terms since the last log, over the rows and tokens of all processes and forwards.

    Sums are kept: forwards and processes have unequal numbers of tokens, and the last one of an evaluation fewer rows.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def reset(self) -> None:
        self.sums = {}

    def add(self, kl: torch.Tensor, entropy: torch.Tensor, tokens: torch.Tensor, diversity: torch.Tensor) -> None:
        """
        Takes in a forward of all processes.

        Args:
            kl, entropy, tokens (`torch.Tensor`): Of each sequence, shape `(B,)`; nats, nats and a count.
            diversity (`torch.Tensor`): The policy-gradient term, mean over the sequences, a scalar.
        """
        sums = torch.stack([kl.sum(), entropy.sum(), tokens.sum(), diversity * len(kl)]).tolist()
        for name, value in zip(("kl", "entropy", "tokens", "diversity", "rows"), [*sums, len(kl)], strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        """Of a sequence `kl`, and the terms of the loss; of a token `kl_per_token` and `entropy`; nats."""
        rows, tokens = self.sums["rows"], max(1.0, self.sums["tokens"])
        return {
            "loss/distillation": self.sums["kl"] / rows,
            "loss/diversity": self.sums["diversity"] / rows,
            "kl": self.sums["kl"] / rows,
            "kl_per_token": self.sums["kl"] / tokens,
            "entropy": self.sums["entropy"] / tokens,
        }


class GradientNorms:
    """Norms of the terms' gradients before clipping, of an update that is logged; not of sharded gradients."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.measured = not is_sharded(accelerator)
        self._diversity: list[torch.Tensor] | None = None

    def add(self, model: torch.nn.Module, diversity: torch.Tensor, forwards: int) -> None:
        """Adds the diversity term's gradient of one of the update's `forwards` on this process."""
        if not self.measured:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(
            diversity / forwards, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        before = self._diversity
        self._diversity = list(gradient) if before is None else [a + b for a, b in zip(before, gradient, strict=True)]

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """The norms, once the update's gradient is in `grad`; what is not the diversity term's is distillation's."""
        if not self.measured:
            return {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        diversity: list[Any] = self._diversity or [None] * len(parameters)
        self._diversity = None
        if all(parameter.grad is None for parameter in parameters):  # the update was left out
            return {}
        norms: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for parameter, part in zip(parameters, diversity, strict=True):
            rest = parameter.grad
            if part is not None:  # on all processes alike
                part = self.accelerator.reduce(part, reduction="mean")
                rest = -part if rest is None else rest - part
            for values, of in zip((rest, part), norms, strict=True):
                if values is not None:
                    of.append(values.to(torch.promote_types(values.dtype, torch.float32)).norm())
        names = "grad_norm/distillation", "grad_norm/diversity"
        return {name: float(torch.stack(of).norm()) if of else 0.0 for name, of in zip(names, norms, strict=True)}


class Stopwatch:
    """Seconds of an update by what they were spent on; what is none of `parts` is the update's own."""

    parts = ("rollout", "teacher", "reward")

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.seconds = dict.fromkeys((*self.parts, "update"), 0.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds that the body takes."""
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda" and name != "update":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forgets what the body takes."""
        before = dict(self.seconds)
        yield
        self.seconds = before

    def lap(self) -> dict[str, float]:
        """`time/...` of this update, mean over the processes, so that they add up; starts the next one."""
        self.seconds["update"] -= sum(self.seconds[name] for name in self.parts)
        here = torch.tensor(list(self.seconds.values()), device=self.accelerator.device)
        means = self.accelerator.reduce(here, reduction="mean").tolist()
        names = [f"time/{name}" for name in self.seconds]
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return dict(zip(names, means, strict=True))
