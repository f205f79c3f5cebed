"""
Compiled steps for the decode loop: a static cache, and a step whose shapes never change, for `torch.compile`.

On a GPU the compiled step is replayed as a CUDA graph, which saves launching each of its kernels from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from trl_drcd.sampling.cache import PreallocatedLayer, preallocated_cache

# Lengths are rounded up to a multiple, so that prompts of other lengths compile nothing anew
ROUNDED = 64  # positions of a static cache
PROMPTS_ROUNDED = 16  # encoded prompts of cross-attention
KEPT = 4  # compiled steps and caches of a decoder, for different sizes

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)
_steps: WeakKeyDictionary[torch.nn.Module, dict[tuple, tuple[Callable, StaticCache]]] = WeakKeyDictionary()


@contextmanager
def static_cache(use: bool = True) -> Iterator[None]:
    """
    Compile the steps of all streams that are created inside.

    Compiling takes about a minute for each size of batch and, on a GPU, the memory of a further cache for each. Rows
    that have ended stay in the batch, and each step attends to the whole cache, so this pays where launching kernels
    takes longer than the kernels: for small models on a GPU.
    """
    token = _compiling.set(use)
    try:
        yield
    finally:
        _compiling.reset(token)


def compiling() -> bool:
    """Whether this is inside of [`static_cache`]."""
    return _compiling.get()


def static_cache_refusal(config: PreTrainedConfig) -> str | None:
    """Why a decoder cannot have a static cache here; `None` if it can."""
    return _refusal(preallocated_cache(config, 1))


def _refusal(cache: DynamicCache) -> str | None:
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, PreallocatedLayer)}
    return f"it has layers that keep their past otherwise ({', '.join(sorted(others))})" if others else None


def last_hidden_states(decoder: Callable[..., Any], **inputs: Any) -> torch.Tensor:
    """Hidden states of the last position, after the final norm, `(R, H)`."""
    hidden: torch.Tensor = decoder(**inputs).last_hidden_state[:, -1]
    return hidden


def _copied(function: Any) -> FunctionType:
    """A function with a code object of its own: dynamo compiles each only a few times, and then runs it as it is."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _fill(layer: Any, source: Any) -> None:
    """
    Copy what a preallocated layer holds into a static one.

    What a longer rollout has left behind is cleared: attention gives it the weight 0, and 0 times NaN is NaN.
    """
    if not layer.is_initialized:
        # It gives both the type of the first. Under autocast, rotary embeddings make the keys alone float32
        layer.lazy_initialization(source.values, source.values)
        values = layer.values
        layer.lazy_initialization(source.keys, source.values)
        layer.values = values
    filled = source.get_seq_length()
    for states, found in ((layer.keys, source.keys), (layer.values, source.values)):
        states[:, :, :filled] = found
        states[:, :, filled:] = 0
    layer.cumulative_length.fill_(filled)


def rounded_up(length: int) -> int:
    """The positions of a static cache for `length` positions."""
    return -(-length // ROUNDED) * ROUNDED


def padded(condition: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of cross-attention, each `(U, P, ...)`, filled up on the left with what the mask leaves out."""
    missing = {name: -tensor.shape[1] % PROMPTS_ROUNDED for name, tensor in condition.items()}
    return {
        name: torch.nn.functional.pad(tensor, (0,) * (2 * (tensor.ndim - 2)) + (missing[name], 0))
        for name, tensor in condition.items()
    }


def compiled_step(decoder: Any, cache: Any) -> tuple[Callable[..., torch.Tensor], Any]:
    """
    A compiled forward of a decoder for one position, and the cache it works on.

    Both are kept with the decoder for the next rollout with as many rows and positions: its cache has the addresses
    that a CUDA graph has recorded.

    Args:
        decoder (`PreTrainedModel`): Returns hidden states after the final norm.
        cache (`DynamicCache` or `EncoderDecoderCache`): Of preallocated layers, after the first forward; what it holds
            is copied.

    Returns:
        `tuple`: A function of the decoder's arguments that returns last hidden states `(R, H)`, and the static cache.

    Raises:
        ValueError: If a layer keeps its past otherwise: only some positions, or a state.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if reason := _refusal(own):
        raise ValueError(f"`cache_implementation=static` is not supported by {type(decoder).__name__}: {reason}")
    first: Any = own.layers[0]
    read = 0 if own is cache else cache.cross_attention_cache.layers[0].keys.shape[2]
    shape = (len(first.keys), first.length, read, first.keys.dtype, first.values.dtype, first.keys.device)
    kept = _steps.setdefault(decoder, {})
    if shape not in kept:
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        mode = "reduce-overhead" if first.keys.is_cuda else None  # CUDA graphs
        compiled = torch.compile(_copied(last_hidden_states), mode=mode, dynamic=False)
        kept[shape] = compiled, StaticCache(config=decoder.config, max_cache_len=first.length)
    forward, static = kept[shape] = kept.pop(shape)  # the latest comes last
    for layer, source in zip(static.layers, own.layers, strict=True):
        _fill(layer, source)

    def step(**inputs: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # The decoder is an argument: a compiled method would keep it, and with it its entry, for good
        return forward(decoder, **inputs).clone()  # the next replay overwrites what it returns

    return step, EncoderDecoderCache(static, cache.cross_attention_cache) if own is not cache else static
