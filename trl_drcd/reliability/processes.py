"""What the processes of a run know of each other: what each does, and how long it waits for the others."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from trl_drcd.compat.torch_distributed import default_store

KEY = "trl_drcd/status/"


def report_status(what: str) -> None:
    """Tells the other processes what this one does now."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        store = default_store()
        if store is not None:
            store.set(f"{KEY}{dist.get_rank()}", what)


def last_statuses() -> str:
    """What each process reported last; for the message after an exchange that failed."""
    told = []
    try:
        store = default_store()
        store.set_timeout(timedelta(seconds=2))  # its process may be the one that is gone
        for rank in range(dist.get_world_size()):
            key = f"{KEY}{rank}"
            told.append(f"process {rank}: {store.get(key).decode() if store.check([key]) else 'nothing yet'}")
    except (RuntimeError, AttributeError):
        told.append("the others cannot be asked")
    return "; ".join(told)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed, by what the backends say then."""
    signs = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
