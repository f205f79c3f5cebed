"""Write files to a temporary name, then rename them, so that nobody reads half a file."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trl_drcd.compat.extras import require

if TYPE_CHECKING:
    import torch

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def write_bytes(path: str | Path, content: bytes) -> None:
    """
    Write a file in one step; its folder is made, an existing file replaced.

    The content goes to a new file of an unpredictable name in the same folder, reaches the disk, and then takes the
    file's name. If writing fails, that new file is removed; after a kill see [`remove_temporaries`].

    Raises:
        OSError: If the disk is full or not writable; the message names the file, the free room and the remedy.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:  # "x": never a file or a link that is there already
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """[`write_bytes`] of a text in UTF-8."""
    write_bytes(path, text.encode())


def remove_temporaries(folder: str | Path, older_than: float = 3600.0) -> None:
    """
    Remove what killed processes left of [`write_bytes`] in a folder, its subfolders not included.

    Args:
        folder (`str` or `Path`): A folder, which need not exist.
        older_than (`float`, *optional*, defaults to 3600.0): Seconds since the last write; a younger file may belong
            to a process that is still writing it.
    """
    for file in Path(folder).glob(".*.tmp"):
        try:
            if len(file.name.split(".")[-2]) == 16 and time.time() - file.lstat().st_mtime > older_than:
                file.unlink()
        except OSError:
            continue  # another process was first, or it is not ours


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """
    Say what to do where writing `path` fails for want of room or of permission.

    Raises:
        OSError: With the `errno` of the failure, and a message that names the file, the free room and the remedy.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
            raise OSError(number, f"no room: {room(path)}", str(path)) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            cause = os.strerror(error.errno or 0).lower()
            remedy = f"cannot be written ({cause}); give a folder that is writable"
            raise OSError(error.errno, remedy, str(path)) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, of whatever library, says that the disk is full or a quota used up."""
    return getattr(error, "errno", None) in DISK_FULL or "No space left on device" in str(error)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, of which only the first folders need exist."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def check_room(path: Path, needed: int) -> None:
    """
    Refuse, before anything is computed, to write more than the disk has room for.

    Args:
        path (`Path`): What is to be written.
        needed (`int`): Its size in bytes.

    Raises:
        OSError: If less is free.
    """
    if free_bytes(path) < needed:
        raise OSError(errno.ENOSPC, f"no room for {needed / 2**20:.1f} MiB: {room(path)}", str(path))


def room(path: Path) -> str:
    """How much is free on the disk of a path, and what to do."""
    return f"{free_bytes(path) / 2**20:.1f} MiB are free on its disk; free some, or write to another disk"


def plain_name(text: str, length: int = 80) -> str:
    """
    A text as a name for files and log entries: letters, digits, spaces and a few marks, at most `length` of them.

    Characters with a meaning in a path, a page or a shell become `_`, and so do invisible ones.
    """
    kept = "".join(c if c.isalnum() or c in " ,;-_+()!" else "_" for c in text)
    return kept[:length].strip() or "_"


def distinct_names(texts: Sequence[str]) -> list[str]:
    """[`plain_name`] of each text, with its number before it where an earlier one has the same name."""
    names: list[str] = []
    for number, text in enumerate(texts):
        name = plain_name(text)
        names.append(plain_name(f"{number} {name}") if name in names else name)
    return names


def wav_bytes(waveform: torch.Tensor, sampling_rate: int) -> bytes:
    """
    The content of a 16-bit WAV file.

    Args:
        waveform (`torch.Tensor`): Shape `(T,)`, float samples in `[-1, 1]`, on the CPU.
        sampling_rate (`int`): In Hz.

    Returns:
        `bytes`: For [`write_bytes`], or to embed in a page.

    Raises:
        ImportError: If soundfile is missing; it comes with the extra `audio`.
    """
    file = io.BytesIO()
    require("soundfile", "audio").write(file, waveform.numpy(), sampling_rate, subtype="PCM_16", format="WAV")
    return file.getvalue()


def local_name(path: str) -> str:
    """The last part of a local path; a hub name as it is."""
    return Path(path).resolve().name if Path(path).exists() else path


def own_file(folder: str | Path, name: str) -> Path | None:
    """
    A file of a model's folder, by its path inside the folder; `None` if there is none.

    Links may lead to other files of the folder, and from a snapshot in the Hub's cache to the blobs of that
    repository, where the cache keeps all contents.

    Raises:
        ValueError: If the file is a link that leaves the folder: what it names may be anything on this machine.
    """
    root, path = Path(folder).resolve(), Path(folder, name)
    if not path.is_file():
        return None
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{path} is a link out of the folder, to {path.resolve()}; put the file itself there")
    return path
