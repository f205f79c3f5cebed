"""Memory that the C library keeps for the next tensor instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """
    Tell glibc to keep what tensors on the CPU have freed; where there is an accelerator or no glibc, nothing is done.

    By default it maps every block above some MiB anew and gives it back at once, so that each big tensor is paid for
    page by page, again and again. Meant for programs, at their start: it holds for the whole process, which then never
    shrinks. MEASURED

    Returns:
        `bool`: Whether it was set.
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
