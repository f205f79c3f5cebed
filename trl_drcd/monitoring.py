"""What the trainer measures of an update, over all processes: means of its terms, norms of their gradients, times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from trl_drcd.distributed import is_sharded
from trl_drcd.gradient_snr import GradientSNR


class RunningMeans:
    """
    Means of the loss terms since the last log, over the rows and tokens of all processes and forwards.

    Sums are kept: forwards and processes have unequal numbers of tokens, and the last one of an evaluation fewer rows.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def reset(self) -> None:
        """Starts again."""
        self.sums = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """
        Adds a forward of all processes.

        Args:
            rows (`dict[str, torch.Tensor]`): Of each sequence, shape `(B,)`: the loss terms by their names,
                `distillation` (KL) among them, `entropy`, all in nats, and the number of `tokens`.
        """
        names, values = list(rows), torch.stack(list(rows.values()))
        for name, value in zip([*names, "rows"], [*values.sum(1).tolist(), values.shape[1]], strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        """Loss terms and KL per sequence; KL and entropy per token; nats."""
        sums = dict(self.sums)
        rows, tokens, entropy = sums.pop("rows"), max(1.0, sums.pop("tokens")), sums.pop("entropy")
        kl = sums["distillation"]
        terms = {f"loss/{name}": value / rows for name, value in sums.items()}
        return terms | {"kl": kl / rows, "kl_per_token": kl / tokens, "entropy": entropy / tokens}


class GradientNorms:
    """
    Norms of the terms' gradients before clipping, of an update that is logged, and the diversity's signal-to-noise
    ratio over the last of them ([`~trl_drcd.gradient_snr.GradientSNR`]); not of sharded gradients.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.measured = not is_sharded(accelerator)
        self.snr = GradientSNR()
        self._parts: dict[str, list[torch.Tensor]] = {}

    def add(self, model: torch.nn.Module, losses: dict[str, torch.Tensor], forwards: int) -> None:
        """Adds the gradients of the terms beside the distillation, of one of the update's `forwards` here."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, loss in losses.items():
            gradient = torch.autograd.grad(
                loss / forwards, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            before = self._parts.get(name)
            self._parts[name] = (
                list(gradient) if before is None else [a + b for a, b in zip(before, gradient, strict=True)]
            )

    def measure(
        self, model: torch.nn.Module, diversity_coef: float, diversity: list[torch.Tensor] | None = None
    ) -> dict[str, float]:
        """
        The norms, once the update's gradient is in `grad`; what is none of the other terms' is distillation's.

        Args:
            model (`torch.nn.Module`): The student.
            diversity_coef (`float`): By which the diversity's gradient is divided before updates are compared.
            diversity (`list[torch.Tensor]`, *optional*): The diversity's gradient, mean over all processes, where it
                is kept apart and is not in `grad`.
        """
        parts, self._parts = self._parts, {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.measured or all(parameter.grad is None for parameter in parameters):  # the update was skipped
            return {}
        rest = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norms = {"grad_norm/diversity": 0.0}
        for name, part in parts.items():
            part = [self.accelerator.reduce(values, reduction="mean") for values in part]  # on all processes alike
            rest = [a - b for a, b in zip(rest, part, strict=True)]
            norms[f"grad_norm/{name}"] = _norm(part)
            if name == "diversity":
                self.snr.add(part, diversity_coef)
        if diversity is not None:
            norms["grad_norm/diversity"] = _norm(diversity)
            self.snr.add(diversity, diversity_coef)
        ratio = self.snr.value()
        return {"grad_norm/distillation": _norm(rest)} | norms | ({} if ratio is None else {"snr/diversity": ratio})


def _norm(tensors: list[torch.Tensor]) -> float:
    """Of all of them together, taken in float32 at least."""
    norms = [values.to(torch.promote_types(values.dtype, torch.float32)).norm() for values in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


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
