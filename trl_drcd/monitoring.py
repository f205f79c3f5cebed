"""Metrics of an update over all processes: means of the loss terms, norms of their gradients, and times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from trl_drcd.clipping import SeparateGradient
from trl_drcd.distributed import is_sharded
from trl_drcd.gradient_snr import GradientSNR


class RunningMeans:
    """
    Means of the loss terms since the last log, over the rows and tokens of all processes and forwards.

    Accumulates sums, because the numbers of tokens and rows differ between forwards and processes.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def reset(self) -> None:
        """Reset all sums."""
        self.sums = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """
        Add one forward of all processes.

        Args:
            rows (`dict[str, torch.Tensor]`): Values of each sequence, shape `(B,)`: the loss terms by name, including
                `distillation` (the KL); `entropy`; all in nats; and the number of `tokens`.
        """
        names, values = list(rows), torch.stack(list(rows.values()))
        for name, value in zip([*names, "rows"], [*values.sum(1).tolist(), values.shape[1]], strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        """Means in nats: loss terms and KL per sequence, KL and entropy per token."""
        sums = dict(self.sums)
        rows, tokens, entropy = sums.pop("rows"), max(1.0, sums.pop("tokens")), sums.pop("entropy")
        kl = sums["distillation"]
        terms = {f"loss/{name}": value / rows for name, value in sums.items()}
        return terms | {"kl": kl / rows, "kl_per_token": kl / tokens, "entropy": entropy / tokens}


class GradientNorms:
    """
    Norms of the gradients of the loss terms before clipping, for updates that are logged, and the signal-to-noise
    ratio of the diversity gradient over recent ones ([`~trl_drcd.gradient_snr.GradientSNR`]). Disabled for sharded
    gradients.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.measured = not is_sharded(accelerator)
        self.snr = GradientSNR()
        self._parts: dict[str, SeparateGradient] = {}

    def add(self, model: torch.nn.Module, losses: dict[str, torch.Tensor], forwards: int) -> None:
        """Add the gradients of the terms other than distillation, from one of the update's `forwards` forwards."""
        for name, loss in losses.items():
            self._parts.setdefault(name, SeparateGradient(self.accelerator)).add(model, loss, forwards)

    def measure(
        self, model: torch.nn.Module, diversity_coef: float, diversity: list[torch.Tensor] | None = None
    ) -> dict[str, float]:
        """
        Compute the norms from the accumulated gradients of the update.

        The gradient of the distillation term is the total gradient minus those of the other terms.

        Args:
            model (`torch.nn.Module`): The student, with the gradient of the update in `grad`.
            diversity_coef (`float`): Divides the diversity gradient, so that different updates can be compared.
            diversity (`list[torch.Tensor]`, *optional*): The diversity gradient, averaged over all processes, if it is
                kept separately and not included in `grad`.

        Returns:
            `dict[str, float]`: `grad_norm/...` for each term, and `snr/diversity` (no unit) once it is defined; empty
            if the update was skipped or gradients are sharded.
        """
        parts, self._parts = self._parts, {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.measured or all(parameter.grad is None for parameter in parameters):  # the update was skipped
            return {}
        rest = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norms = {"grad_norm/diversity": 0.0}
        for name, separate in parts.items():
            part = separate.mean()  # collective
            rest = [a - b for a, b in zip(rest, part, strict=True)]
            norms[f"grad_norm/{name}"] = _norm(part)
            if name == "diversity":
                self.snr.add(part, diversity_coef)
        if diversity:
            norms["grad_norm/diversity"] = _norm(diversity)
            self.snr.add(diversity, diversity_coef)
        ratio = self.snr.value()
        return {"grad_norm/distillation": _norm(rest)} | norms | ({} if ratio is None else {"snr/diversity": ratio})


def _norm(tensors: list[torch.Tensor]) -> float:
    """The norm of all tensors together, in float32 or float64."""
    norms = [values.to(torch.promote_types(values.dtype, torch.float32)).norm() for values in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


class Stopwatch:
    """Seconds of an update, split into `parts`; the remaining time is counted as `update`."""

    parts = ("rollout", "teacher", "reward")

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.seconds = dict.fromkeys((*self.parts, "update"), 0.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the body to `name`."""
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda" and name != "update":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the duration of the body."""
        before = dict(self.seconds)
        yield
        self.seconds = before

    def lap(self) -> dict[str, float]:
        """Return `time/...` of this update in seconds, averaged over the processes, and start the next update."""
        self.seconds["update"] -= sum(self.seconds[name] for name in self.parts)
        here = torch.tensor(list(self.seconds.values()), device=self.accelerator.device)
        means = self.accelerator.reduce(here, reduction="mean").tolist()
        names = [f"time/{name}" for name in self.seconds]
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return dict(zip(names, means, strict=True))
