"""Threads of a process on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SMALL = 30_000_000  # weights: between a model that samples faster on one thread (5.7 M) and one on two (135 M)


def own_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """
    Physical cores that this process may use: those of its affinity mask and of its container's quota, at least 1.

    It depends on the machine alone, not on its load, so that a run on the same machine is reproduced bit for bit.

    Args:
        quota_file (`Path`, *optional*): Processor time and period of a cgroup (version 2), microseconds.
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, quota_file.read_text().split())
        cores = min(cores, quota // period)
    return max(1, cores)


def use_own_cores(processes: int | None = None) -> None:
    """
    Limit torch to a thread per physical core, of the cores that the processes of a program share.

    torch's own default counts hyper-threads and all cores of a host of which a container may use only some. Fewer
    threads, by `OMP_NUM_THREADS`, are left as they are.

    Args:
        processes (`int`, *optional*): Processes on this machine; `LOCAL_WORLD_SIZE`, which launchers set, if `None`.
    """
    import torch

    share = own_cores() // (processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))


@contextmanager
def decoding_threads(model: Any) -> Iterator[None]:
    """
    Let a small model sample on one thread: its products are so short that waiting for each other takes longer.

    Measured on two cores with threads that sleep early: a rollout of 5.7 million weights takes 2.20 s on one thread
    and 2.43 s on two (beside another process 2.42 and 3.92); in a short trial one of 135 million was faster on two.

    Args:
        model (`torch.nn.Module`): The model that samples.
    """
    import torch

    before = torch.get_num_threads()
    if before > 1 and sum(weights.numel() for weights in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
