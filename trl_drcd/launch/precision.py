"""Whether bfloat16 is faster than float32 on this machine."""

from __future__ import annotations

import functools
import time

import torch
from transformers import LlamaConfig, LlamaModel

MARGIN = 0.9  # of the seconds in float32: a gain that is less is not worth the rounding


@functools.cache
def has_fast_bfloat16() -> bool:
    """
    Whether this machine trains faster under bfloat16 autocast than in float32.

    A GPU says so itself. A CPU without instructions for bfloat16 only emulates it; one with them is measured, once in
    a process and for about a second, since some of these are slower all the same: casts and small matrices cost more
    than the products gain.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    seconds = training_seconds()
    return seconds[torch.bfloat16] < MARGIN * seconds[torch.float32]


def training_seconds(width: int = 256, tokens: int = 1024, rounds: int = 2) -> dict[torch.dtype, float]:
    """
    Seconds of a forward and backward pass of two transformer layers on a CPU, the least of some rounds in turn.

    Args:
        width (`int`, *optional*, defaults to 256): Hidden size, that of the shipped model.
        tokens (`int`, *optional*, defaults to 1024): In 8 sequences.
        rounds (`int`, *optional*, defaults to 2): After one to warm up.

    Returns:
        `dict`: Under bfloat16 autocast, and in float32 without.
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
