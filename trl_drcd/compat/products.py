"""
Float32 products on x86 processors, by whichever of torch's libraries is the faster on this one.

torch multiplies by MKL. On an AMD processor oneDNN, which torch has too, was 1.3 to 2.8 times as fast
(benchmarks/products.py), so it takes MKL's place there: in [`linear`], and by [`fast_products`] in all models that
compute inside of it, where a product has the rows to be faster for it. Both libraries have kernels for a weight that
was rearranged before ([`pack`]). The choice depends on processor and shapes, not on a measurement, so that runs on the
same machine agree bit for bit.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch.autograd.forward_ad import unpack_dual

torch_linear = torch._C._nn.linear  # `torch.nn.functional.linear`, unless another library has replaced it
LEAST_ROWS = 16  # of a product by oneDNN whose weight is not packed: with fewer MKL is as fast
LEAST_ENTRIES = 4096  # of its weight: a smaller one takes less time than the way to oneDNN


@lru_cache
def product_library(cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["MKL", "oneDNN"] | None:
    """
    The library for float32 products: oneDNN on AMD processors (and Hygon's) with AVX-512, MKL on all others; `None` if
    this build of torch has not the operators, such as those for ARM.
    """
    names = {
        torch.ops.mkl: ("_mkl_linear", "_mkl_reorder_linear_weight"),
        torch.ops.mkldnn: ("_linear_pointwise", "_reorder_linear_weight"),
    }
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()) or not all(
        hasattr(library, name) for library, own in names.items() for name in own
    ):
        return None
    maker = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    other = "AuthenticAMD" in maker or "HygonGenuine" in maker
    return "oneDNN" if other and torch.backends.cpu.get_cpu_capability() == "AVX512" else "MKL"


# ---------------------------------------------------------------- packed weights, without gradients


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A float32 weight `(out, in)` as the library's kernel reads it, for products with that many rows; opaque."""
    packed: torch.Tensor
    if product_library() == "oneDNN":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    else:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed


def packed_product(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """
    `x @ weight.T + bias`, `(..., out)`, without gradients.

    Args:
        x (`torch.Tensor`): Shape `(..., in)`, float32.
        packed (`torch.Tensor`): [`pack`] of `weight` and `rows`, the number of rows of `x`.
        weight (`torch.Tensor`): Shape `(out, in)`.
        bias (`torch.Tensor`, *optional*): Shape `(out,)`.
        rows (`int`): At least 1.
    """
    if product_library() == "oneDNN":
        return _by_onednn(x, packed, bias)
    product: torch.Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    return product


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # its strides would be ignored
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return product


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where oneDNN cannot read it by its strides, such as one that is expanded."""
    if tensor.is_mkldnn or tensor.is_contiguous():
        return tensor
    if tensor.ndim == 2:
        (rows, columns), strides = tensor.shape, tensor.stride()
        if (strides[1] == 1 and strides[0] >= columns) or (strides[0] == 1 and strides[1] >= rows):
            return tensor
    return tensor.contiguous()


# ---------------------------------------------------------------- weights as they are, with gradients


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` by oneDNN; its gradients are products by [`linear`], so that they have gradients too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if of_x else None,
            linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is float32 on a CPU: not sharded, not quantised."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def is_plain_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether all [`is_plain`] and of sizes that fit, outside of autocast; where one is wrong, torch says so."""
    return (
        is_plain(x)
        and is_plain(weight)
        and x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and weight.numel() > 0
        and (bias is None or (is_plain(bias) and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN does the product, and is the faster for it."""
    return (
        not torch.compiler.is_compiling()
        and product_library() == "oneDNN"
        and bool(torch.backends.mkldnn.enabled)
        and is_plain_product(x, weight, bias)
        and x.shape[:-1].numel() >= LEAST_ROWS
        and weight.numel() >= LEAST_ENTRIES
        and not torch.jit.is_tracing()
        and not any(unpack_dual(each).tangent is not None for each in (x, weight, bias) if each is not None)
        and not torch._C._are_functorch_transforms_active()
    )


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    [`torch.nn.functional.linear`], by oneDNN where that is faster; differentiable.

    Args:
        input (`torch.Tensor`): Shape `(..., in)`.
        weight (`torch.Tensor`): Shape `(out, in)`.
        bias (`torch.Tensor`, *optional*): Shape `(out,)`.

    Returns:
        `torch.Tensor`: Shape `(..., out)`.
    """
    if not _fits(input, weight, bias):
        plain = torch.nn.functional.linear
        product: torch.Tensor = (torch_linear if plain is linear else plain)(input, weight, bias)
        return product
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (input, weight, bias)):
        product = _Linear.apply(input, weight, bias)
        return product
    return _by_onednn(input, weight, bias)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, of matrices, without gradients; by oneDNN where that is faster."""
    alike = is_plain(total) and total.shape == (len(left), right.shape[1])
    if alike and _fits(left, right.t(), None) and not torch.is_grad_enabled():
        total += _by_onednn(left, right.t())
    else:
        total.addmm_(left, right)


_lock = Lock()
_inside = 0  # contexts, of all threads


@contextmanager
def fast_products() -> Iterator[None]:
    """
    Let `torch.nn.functional.linear`, which models call, be [`linear`] inside.

    Enter it around forward and backward together: gradient checkpointing repeats the forward in the backward. It holds
    for all threads until the last has left. A `linear` that another library has put in torch's place, as DeepSpeed
    does for ZeRO-3, stays. `torch.jit.script` cannot be called inside.
    """
    global _inside
    if product_library() != "oneDNN":
        yield
        return
    with _lock:
        if not _inside and torch.nn.functional.linear is torch_linear:
            torch.nn.functional.linear = linear
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and torch.nn.functional.linear is linear:
                torch.nn.functional.linear = torch_linear
