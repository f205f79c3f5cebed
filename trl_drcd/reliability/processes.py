"""What the processes of a run know of each other: who waits for whom, and for how long."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

KEY = "trl_drcd/doing/"


def limit_waiting(seconds: float) -> None:
    """
    How long a process waits for the others in an exchange before it raises.

    transformers leaves `ddp_timeout` out on the CPU, and where the process group is there already.
    """
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def doing(what: str) -> None:
    """Tells the other processes what this one does now."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        store = distributed_c10d._get_default_store()
        if store is not None:  # MPI has none
            store.set(f"{KEY}{dist.get_rank()}", what)


def what_others_did() -> str:
    """What each process told last; for the message after an exchange that failed."""
    told = []
    try:
        store = distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=2))  # its process may be the one that is gone
        for rank in range(dist.get_world_size()):
            key = f"{KEY}{rank}"
            told.append(f"process {rank}: {store.get(key).decode() if store.check([key]) else 'nothing yet'}")
    except (RuntimeError, AttributeError):
        told.append("the others cannot be asked")
    return "; ".join(told)


def lost_the_others(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed, as the backends say it."""
    signs = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
