"""Products of MKL with a weight that was packed before: operators of torch, which its compiler uses on a CPU."""

from __future__ import annotations

import torch


def has_packed_products() -> bool:
    """Whether this build of torch has them: those for x86 processors on PyPI do."""
    names = "_mkl_linear", "_mkl_reorder_linear_weight"
    return torch.backends.mkl.is_available() and all(hasattr(torch.ops.mkl, name) for name in names)


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A float32 weight `(out, in)` as MKL's kernel reads it, for products with that many rows; opaque."""
    packed: torch.Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed


def packed_product(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """
    `x @ weight.T + bias`, `(..., out)`, without gradients.

    Args:
        x (`torch.Tensor`): Shape `(..., in)`, float32.
        packed (`torch.Tensor`): [`pack`] of `weight` and `rows`; with another number of rows in `x` it is not used.
        weight (`torch.Tensor`): Shape `(out, in)`.
        bias (`torch.Tensor`, *optional*): Shape `(out,)`.
        rows (`int`): At least 1.
    """
    product: torch.Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    return product
