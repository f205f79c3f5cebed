"""Whether bfloat16 is faster than float32 on this machine."""

from __future__ import annotations

import functools
import time

import torch
from transformers import LlamaConfig, LlamaModel

MARGIN = 0.9  # largest ratio of the time to float32's: a smaller gain does not justify the lower precision


def has_native_bfloat16() -> bool:
    """Whether this machine's GPU, or its CPU if it has none, computes in bfloat16 and does not only emulate it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def has_fast_bfloat16() -> bool:
    """
    Whether this machine trains faster under bfloat16 autocast than in float32.

    For a GPU, whether it supports bfloat16 natively. A CPU without bfloat16 instructions only emulates it. A CPU with
    them is measured, once per process for about a second, since on some of them casts and small matrices cost more
    than the faster products gain.
    """
    if torch.cuda.is_available() or not has_native_bfloat16():
        return has_native_bfloat16()
    seconds = training_seconds()
    return seconds[torch.bfloat16] < MARGIN * seconds[torch.float32]


def training_seconds(width: int = 256, tokens: int = 1024, rounds: int = 2) -> dict[torch.dtype, float]:
    """
    Time a forward and backward pass of two transformer layers on the CPU; the minimum of several alternating rounds.

    Args:
        width (`int`, *optional*, defaults to 256): Hidden size; the default is that of the shipped model.
        tokens (`int`, *optional*, defaults to 1024): Total number of tokens, in 8 sequences.
        rounds (`int`, *optional*, defaults to 2): Rounds after one to warm up.

    Returns:
        `dict`: Seconds for `torch.bfloat16` (autocast) and `torch.float32`.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaModel(config)
    ids = torch.zeros(8, tokens // 8, dtype=torch.long)
    seconds: dict[torch.dtype, list[float]] = {}
    for _ in range(rounds + 1):
        for dtype in (torch.float32, torch.bfloat16):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                hidden = model(ids, use_cache=False).last_hidden_state
            hidden.float().sum().backward()
            seconds.setdefault(dtype, []).append(time.perf_counter() - start)
    return {dtype: min(values[1:]) for dtype, values in seconds.items()}
