"""Weighted sums of tensors, and the weights of merges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch


def check_weights(weights: Sequence[float], count: int) -> list[float]:
    """
    Check the weights of a merge.

    Args:
        weights (`Sequence[float]`): One per model.
        count (`int`): Number of models.

    Returns:
        `list[float]`: The weights.

    Raises:
        TypeError: If `weights` is not a list of numbers.
        ValueError: If there is not one finite weight per model, or they do not sum to 1 within 1e-6.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(f"`weights` must be a list of numbers, got {weights!r}")
    given = list(weights)
    if any(isinstance(weight, bool) or not isinstance(weight, Real) for weight in given):
        raise TypeError(f"`weights` must be numbers, got {given}")
    values = [float(weight) for weight in given]
    if len(values) != count or count == 0:
        raise ValueError(f"`weights` must have one value for each of {count} models (at least one), got {values}")
    if not all(map(math.isfinite, values)) or abs(math.fsum(values) - 1) > 1e-6:
        raise ValueError(f"`weights` must be finite and sum to 1, got {values}, which sum to {math.fsum(values):g}")
    return values


def two_weights(interpolation_weight: float) -> list[float]:
    """
    `[1 - lambda, lambda]` of Eq. (6).

    Raises:
        TypeError: If lambda is not a number.
        ValueError: If lambda is not in `[0, 1]`.
    """
    if isinstance(interpolation_weight, bool) or not isinstance(interpolation_weight, Real):
        raise TypeError(f"`interpolation_weight` must be a number, got {interpolation_weight!r}")
    if not 0 <= interpolation_weight <= 1:
        raise ValueError(f"`interpolation_weight` must lie between 0 and 1, got {interpolation_weight}")
    return [1 - interpolation_weight, float(interpolation_weight)]


def blend(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Weighted sum `sum_i weights[i] * tensors[i]`, computed in float32 (float64 if any tensor is).

    Tensors of weight 0 are ignored; a single tensor of weight 1 is returned, or copied to `out`, bit for bit. Two
    tensors are combined as `t_0 + l * (t_1 - t_0)`, so that elements equal in both stay exactly equal.

    Args:
        tensors (`Sequence[torch.Tensor]`): Floating-point tensors of the same shape.
        weights (`Sequence[float]`): Their weights, not all 0.
        dtype (`torch.dtype`, *optional*): Data type of the result, rounded once; by default that of the first tensor.
        out (`torch.Tensor`, *optional*): Tensor to write the sum to, in its own data type.

    Returns:
        `torch.Tensor`: The sum, or `out`.
    """
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    (first, weight), *rest = terms
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    if not rest and weight == 1:
        total = first
    elif len(rest) == 1 and abs(weight + rest[0][1] - 1) < 1e-12:
        second, share = rest[0]
        if first.dtype == second.dtype and dtype in (None, first.dtype) and (out is None or out.dtype == first.dtype):
            return torch.lerp(first, second, share, out=out)  # computes low precision in float32 and rounds once
        total = torch.lerp(first.to(wide), second.to(wide), share)
    else:
        total = torch.mul(first.to(wide), weight, out=out if out is not None and out.dtype == wide else None)
        for tensor, weight in rest:
            total.add_(tensor.to(wide), alpha=weight)
    if out is None:
        return total.to(dtype or tensors[0].dtype)
    return out if total is out else out.copy_(total)
