"""Status of the processes of a run, for the error message when one of them is lost."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from trl_drcd.compat.torch_distributed import default_store

KEY = "trl_drcd/status/"


def report_status(what: str) -> None:
    """Publish what this process is doing, in the store of the process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        store = default_store()
        if store is not None:
            store.set(f"{KEY}{dist.get_rank()}", what)


def last_statuses() -> str:
    """The last status of each process, for the message after a failed collective operation."""
    told = []
    try:
        store = default_store()
        store.set_timeout(timedelta(seconds=2))  # the process that hosts the store may be the lost one
        for rank in range(dist.get_world_size()):
            key = f"{KEY}{rank}"
            told.append(f"process {rank}: {store.get(key).decode() if store.check([key]) else 'nothing yet'}")
    except (RuntimeError, AttributeError):
        told.append("the status of the others is not available")
    return "; ".join(told)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error is a failed communication between processes, by the messages of the backends."""
    signs = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
