"""A lock that allows one process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def only_process(folder: str | Path, what: str) -> Iterator[None]:
    """
    Hold an exclusive lock on a folder.

    The operating system releases the lock when the process ends, even after a crash; the file `.lock` stays.

    Args:
        folder (`str` or `Path`): Folder to lock; created if needed.
        what (`str`): What the process does, for the error message, such as `"a training"`.

    Raises:
        BlockingIOError: If another process holds the lock; the message names the process.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, LOCK), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(
                f"{what} runs in {folder} already ({file.read().strip() or 'another process'}); wait for it, or give "
                "another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
