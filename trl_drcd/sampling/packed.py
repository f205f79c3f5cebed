"""
Products with weights that stay as they are, rearranged for the processor once.

A step of sampling multiplies a few rows by each weight. MKL rearranges the weight for its kernel in every product,
which with few rows takes as long as the product itself. Here it is rearranged once for all steps of a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from trl_drcd.compat.mkl import has_packed_products, pack, packed_product

# Weights of a model that are packed at most (2 GiB): each is held twice until the rollout ends
MOST_WEIGHTS = 2**29
LEAST_STEPS = 32  # packing takes as long as about 20 steps save


def packable(weight: torch.Tensor, steps: int) -> bool:
    """
    Whether packing a weight pays in `steps` products and MKL can do it: a float32 matrix of a CPU, in a build of torch
    that has MKL, without autocast.
    """
    return (
        steps >= LEAST_STEPS
        and has_packed_products()
        and type(weight) in (torch.Tensor, torch.nn.Parameter)  # a sharded or a quantised one is something else
        and (weight.device.type, weight.dtype, weight.ndim) == ("cpu", torch.float32, 2)
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class PackedWeight:
    """
    `x @ weight.T + bias` with a packed weight; without gradients.

    A packed weight is for one number of rows, so it is made in the second of two calls with the same number. Calls
    with another number, such as that for the prompts, use the weight as it is.

    Args:
        weight (`torch.Tensor`): Shape `(out, in)`, [`packable`]; it must not change.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach()
        self._latest: tuple[int, torch.Tensor | None] = 0, None  # rows, and the weight packed for them

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): Shape `(..., in)`, float32.
            bias (`torch.Tensor`, *optional*): Shape `(out,)`.

        Returns:
            `torch.Tensor`: Shape `(..., out)`.
        """
        number, packed = self._latest
        rows = x.shape[:-1].numel()
        if rows != number or not rows:
            self._latest = rows, None
            return torch.nn.functional.linear(x, self.weight, bias)
        if packed is None:
            packed = pack(self.weight, rows)
            self._latest = rows, packed
        return packed_product(x, packed, self.weight, bias, rows)


def _linear(product: PackedWeight, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return product(x, bias)


@contextmanager
def packed_weights(model: torch.nn.Module, steps: int) -> Iterator[None]:
    """
    Let the linear layers of a model compute with packed weights. Use it under `torch.no_grad()`.

    Layers whose weights MKL cannot pack stay as they are, and so does a model with more than `MOST_WEIGHTS` weights,
    or one that is to make fewer than `LEAST_STEPS` steps.

    Args:
        model (`torch.nn.Module`): Its weights must not change inside.
        steps (`int`): Forward passes to expect.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and "forward" not in vars(module) and packable(module.weight, steps)
    ]
    if sum(layer.weight.numel() for layer in layers) > MOST_WEIGHTS:
        layers = []
    for layer in layers:
        layer.forward = partial(_linear, PackedWeight(layer.weight), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
