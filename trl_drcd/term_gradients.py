"""
Gradients of single loss terms, beside that of their sum: for the log, and to clip that of the diversity by itself.

REINFORCE is noisy: where the sum of all terms is clipped, the noise of the diversity scales the distillation down.
Clipped apart,

    gradient = clip(rest, max_grad_norm) + clip(diversity, max_grad_norm_diversity * coef(step) / diversity_coef)

so that the warm-up of the coefficient, `coef(step)`, applies to the limit as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn

from trl_drcd.distributed import is_sharded
from trl_drcd.gradient_snr import GradientSNR


class TermGradients:
    """
    The gradients of the policy gradient terms of one update, where they are needed one by one.

    They are needed for `grad_norm/...` of an update that is logged, and that of the diversity for clipping it apart;
    then it is not in the gradient of the sum. The signal-to-noise ratio of the diversity gradient over recent logged
    updates is [`~trl_drcd.gradient_snr.GradientSNR`].

    Args:
        accelerator (`Accelerator`): Of the launch. Where it shards gradients, or scales them as `fp16` does, nothing
            is measured.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.snr = GradientSNR()
        self._parts: dict[str, _SummedGradient] = {}
        self._apart = False

    @property
    def _measurable(self) -> bool:
        return not is_sharded(self.accelerator) and self.accelerator.scaler is None

    def needed(self, names: Iterable[str], logged: bool, apart: bool) -> list[str]:
        """Names of the terms whose gradients this forward has to take one by one."""
        if logged and self._measurable:
            return list(names)
        return ["diversity"] if apart else []

    def take(
        self, model: nn.Module, losses: dict[str, torch.Tensor], names: Iterable[str], apart: bool, forwards: int
    ) -> None:
        """
        Add the gradients of one of the update's `forwards` on this process.

        Args:
            model (`nn.Module`): The student.
            losses (`dict`): Losses of each sequence, shape `(b,)`, by term; with `apart`, that of the diversity is
                detached here, so that the backward pass of the sum leaves it out.
            names (`Iterable[str]`): The terms to take, of [`needed`].
            apart (`bool`): Whether the diversity is clipped apart.
            forwards (`int`): Number of forwards of the update.
        """
        self._apart = apart
        for name in names:
            part = self._parts.setdefault(name, _SummedGradient(self.accelerator))
            part.add(model, losses[name].mean() / forwards)
        if apart:
            losses["diversity"] = losses["diversity"].detach()

    def clear(self) -> None:
        """Start the next update."""
        self._parts, self._apart = {}, False

    def measure(self, model: nn.Module, diversity_coef: float, rollout: int) -> dict[str, float]:
        """
        Compute the norms of the terms' gradients of the update, before clipping.

        That of the distillation is the gradient of the sum minus those of the other terms.

        Args:
            model (`nn.Module`): The student, with the gradient of the sum in `grad`.
            diversity_coef (`float`): Divides the diversity gradient, so that different updates can be compared.
            rollout (`int`): Number of the rollout that the update is of.

        Returns:
            `dict[str, float]`: `grad_norm/...` for each term, and `snr/diversity` (no unit) once it is defined; empty
            if the update was skipped, or nothing is measured.
        """
        parts = self._parts
        if not self._apart:
            self.clear()
        parameters = _trained(model)
        skipped = all(parameter.grad is None for parameter in parameters)
        if skipped or not self._measurable:
            return {}
        rest = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norms = {"grad_norm/diversity": 0.0}
        for name, part in parts.items():
            mean = part.mean()  # collective
            norms[f"grad_norm/{name}"] = _norm(mean)
            if not (self._apart and name == "diversity"):
                rest = [a - b for a, b in zip(rest, mean, strict=True)]
            if name == "diversity":
                self.snr.add(mean, rollout, diversity_coef)
        ratio = self.snr.value()
        return {"grad_norm/distillation": _norm(rest)} | norms | ({} if ratio is None else {"snr/diversity": ratio})

    @torch.no_grad()
    def join(self, model: nn.Module, max_norm: float, norm_of_rest: float) -> float:
        """
        Clip the diversity gradient, add it to `grad` of the parameters, and start the next update.

        Args:
            model (`nn.Module`): The student, whose `grad` holds that of the other terms, clipped.
            max_norm (`float`): Norm that the diversity gradient has at most; 0 leaves it out.
            norm_of_rest (`float`): That of the other terms before clipping.

        Returns:
            `float`: `sqrt(norm_of_rest**2 + norm_of_diversity**2)`, before clipping.
        """
        part = self._parts.get("diversity")
        self.clear()
        if part is None:
            return norm_of_rest
        gradient = part.mean()
        norm = nn.utils.get_total_norm(gradient)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_` does
        for parameter, values in zip(_trained(model), gradient, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(values * factor.to(values))
            elif values.any():  # one that no term reaches keeps no gradient, so that weight decay leaves it alone
                parameter.grad = values * factor.to(values)
        return math.hypot(norm_of_rest, float(norm))


class _SummedGradient:
    """A term's gradient, summed over the forwards of an update: as large as the trainable weights."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sum: list[torch.Tensor] = []
        self._reduced = False

    def add(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Add the gradient of a loss, whose graph stays for the other terms."""
        gradient = torch.autograd.grad(
            loss, _trained(model), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if not self._sum:
            self._sum = list(gradient)
            return
        for index, part in enumerate(gradient):  # not in place: parts may share memory
            self._sum[index] = self._sum[index] + part

    def mean(self) -> list[torch.Tensor]:
        """The mean over all processes, by trained parameter, the same on each."""
        if not self._reduced:
            self._sum = [self.accelerator.reduce(part, reduction="mean") for part in self._sum]
            self._reduced = True
        return self._sum


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _norm(tensors: list[torch.Tensor]) -> float:
    """The norm of all tensors together, in float32 or float64."""
    norms = [values.to(torch.promote_types(values.dtype, torch.float32)).norm() for values in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
