"""
The gradient of the diversity term, kept and clipped apart from that of the other terms.

REINFORCE is noisy: where the sum of all terms is clipped, the noise of the diversity scales the
distillation down. Apart,

    gradient = clip(rest, max_grad_norm) + clip(diversity, max_grad_norm_diversity * coef(step) / diversity_coef)

so that the warm-up of the coefficient, `coef(step)`, holds for the limit as well.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from trl_drcd.distributed import is_sharded


def check_clipping(max_norm: float | None, accelerator: Accelerator) -> None:
    """
    Refuses launches whose gradients lie in pieces, which `torch.autograd.grad` does not gather.

    Raises:
        ValueError: If `max_norm` is given under FSDP or DeepSpeed.
    """
    if max_norm is not None and is_sharded(accelerator):
        raise ValueError(
            f"`max_grad_norm_diversity={max_norm}` does not go with {accelerator.distributed_type.value}, which "
            "spreads gradients over processes; leave it out, or use DDP (recipes/accelerate/ddp.yaml)"
        )


class SeparateGradient:
    """
    A term's gradient of one update, summed over its forwards: one more copy of the trainable weights' gradients.

    Args:
        accelerator (`Accelerator`): Of the launch; not one that spreads gradients over processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sum: list[torch.Tensor] = []
        self._reduced = False

    def add(self, model: nn.Module, loss: torch.Tensor, forwards: int) -> None:
        """Adds the gradient of one of the update's `forwards` on this process; the graph stays for the other terms."""
        gradient = torch.autograd.grad(
            loss / forwards, _trained(model), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if not self._sum:
            self._sum = list(gradient)
            return
        for index, part in enumerate(gradient):  # not in place: parts may share memory
            self._sum[index] = self._sum[index] + part

    def mean(self) -> list[torch.Tensor]:
        """Of all processes, by trained parameter, the same on each; empty where nothing was added."""
        if self._sum and not self._reduced:
            self._sum = [self.accelerator.reduce(part, reduction="mean") for part in self._sum]
            self._reduced = True
        return self._sum

    def clear(self) -> None:
        """Starts the next update."""
        self._sum, self._reduced = [], False

    @torch.no_grad()
    def join(self, model: nn.Module, max_norm: float) -> float:
        """
        Clips the gradient, adds it to `grad` of the parameters, and starts the next update.

        Args:
            model (`nn.Module`): The student, whose `grad` holds that of the other terms, clipped.
            max_norm (`float`): Length that the gradient has at most; 0 leaves it out.

        Returns:
            `float`: Its length before clipping.
        """
        gradient = self.mean()
        self.clear()
        if not gradient:
            return 0.0
        norm = nn.utils.get_total_norm(gradient)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_` does
        for parameter, part in zip(_trained(model), gradient, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(part * factor.to(part))
            elif part.any():  # one that no term reaches keeps no gradient, so that weight decay leaves it alone
                parameter.grad = part * factor.to(part)
        return float(norm)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
