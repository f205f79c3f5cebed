"""glibc allocator settings that keep freed memory for reuse instead of returning it to the system."""

from __future__ import annotations

import ctypes
import sys

# Parameter numbers from mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """
    Make glibc keep freed CPU memory for reuse. Does nothing with an accelerator or without glibc.

    By default glibc maps every block above 32 MiB separately and unmaps it when freed, so each large tensor causes
    new page faults. Call this once at the start of a program: it applies to the whole process, whose memory then
    never shrinks.

    Measured while sampling 64 sequences from the shipped MusicLM on one thread, two alternating runs of each: 897 and
    967 tokens per second of CPU time without it, 1,950 and 1,822 with it; 3.7 million page faults against 0.18
    million; peak memory 721 against 768 MiB. The environment variables `MALLOC_MMAP_THRESHOLD_=4294967296
    MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456` have the same effect (1,774 and 1,791). A training
    step of 32 sequences takes 9.9 s without and 7.9 s with such variables on one core of an Intel Xeon, one run of
    four updates of `musiclm_quality.yaml` each (on an AMD EPYC there was no clear gain).

    Returns:
        `bool`: Whether the settings were applied.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return [mallopt(name, value) for name, value in settings.items()] == [1, 1, 1]
