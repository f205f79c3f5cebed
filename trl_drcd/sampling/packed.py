"""
Products with weights that stay as they are, rearranged for the processor once.

A step of sampling multiplies a few rows by each weight. MKL and oneDNN rearrange the weight for their kernels in every
product, which with few rows takes as long as the product itself. Here it is rearranged once, and kept until the
rollout ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trl_drcd.compat.products import is_plain, is_plain_product, linear, pack, packed_product, product_library
from trl_drcd.heads import Head

# Packing a weight takes as long as 2 to 15 products. It pays from 8 rows, once their number lasts: in a batch whose
# sequences end one after another it changes often
LEAST_ROWS = 8
LASTING = 12  # products with the same weight and number of rows, after which it is packed
MOST_WEIGHTS = 2**29  # of a model's layers together, and of its head (2 GiB each): packed weights are held twice
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class PackedProduct:
    """
    `x @ weight.T + bias`, with a packed weight where that is faster; without gradients.

    The weight is packed for a number of rows once that has been the same `LASTING` times, and anew if it has changed.
    """

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()  # the latest product's
        self._weight: torch.Tensor | None = None  # the latest one; kept, so that no other gets its id
        self._calls = 0  # with this key
        self._packed: tuple[tuple[int, ...], torch.Tensor] | None = None  # the key it is for, and the packed weight

    def __deepcopy__(self, memo: dict) -> PackedProduct:
        return PackedProduct()

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): Shape `(..., in)`.
            weight (`torch.Tensor`): Shape `(out, in)`.
            bias (`torch.Tensor`, *optional*): Shape `(out,)`.

        Returns:
            `torch.Tensor`: Shape `(..., out)`.
        """
        rows = x.shape[:-1].numel()
        if rows < LEAST_ROWS or torch.is_grad_enabled() or not is_plain_product(x, weight, bias):
            return linear(x, weight, bias)
        key = rows, id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if key != self._key:
            self._key, self._weight, self._calls, self._packed = key, weight, 0, None
        self._calls += 1
        packed = self._packed
        if packed is None and self._calls > LASTING:
            packed = self._packed = key, pack(weight, rows)
        if packed is None or packed[0] != key:  # another thread may have packed it for other rows meanwhile
            return linear(x, weight, bias)
        return packed_product(x, packed[1], weight, bias, rows)


@dataclass
class PackedHead(Head):
    """A head for sampling, whose projection has a packed weight where that is faster."""

    packed: PackedProduct = field(default_factory=PackedProduct, init=False, repr=False, compare=False)

    def product(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() > MOST_WEIGHTS or not product_library():
            return super().product(hidden, weight)
        return self.packed(hidden, weight)


def packed_head(head: Head) -> Head:
    """The same head as a [`PackedHead`]; one of another class stays as it is."""
    given = {name: getattr(head, name) for name in Head.__dataclass_fields__}
    return PackedHead(**given) if type(head) is Head else head


def _forward(layer: torch.nn.Linear, product: Product, input: torch.Tensor) -> torch.Tensor:
    if type(layer) is not torch.nn.Linear:  # parametrized meanwhile
        return type(layer).forward(layer, input)
    return product(input, layer.weight, layer.bias)


@contextmanager
def packed_weights(model: torch.nn.Module) -> Iterator[None]:
    """
    Let the linear layers of a model compute with packed weights, by a `forward` of each layer's own.

    Weights that change inside are packed anew, if torch counts the change (as it does not through `.data`); what
    cannot be packed is computed as before. With more than `MOST_WEIGHTS` weights in these layers none is packed.

    Args:
        model (`torch.nn.Module`): Layers that have a `forward` of their own already keep it.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and "forward" not in vars(module) and is_plain(module.weight)
    ]
    packs = product_library() is not None and sum(layer.weight.numel() for layer in layers) <= MOST_WEIGHTS
    if not packs and product_library() != "oneDNN":
        layers = []
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer, PackedProduct() if packs else linear)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # of two threads that sample at the same time, the first has done it
