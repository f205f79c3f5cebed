"""Atomic writing of files, disk-space checks, and names of files."""

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


class DiskError(OSError):
    """A full disk, or a folder that cannot be written to; the message says what to do."""


def write_bytes(path: str | Path, content: bytes) -> None:
    """
    Write a file atomically, creating its folder and replacing an existing file.

    The content is written to a temporary file with a random name in the same folder, flushed to disk, and renamed. If
    writing fails, the temporary file is removed; after a kill, see [`remove_temporaries`].

    Args:
        path (`str` or `Path`): File to write.
        content (`bytes`): Its content.

    Raises:
        OSError: If the disk is full or not writable; the message gives the file, the free space and the fix.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:  # "x": never write to an existing file or link
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def open_to_readers(folder: str | Path) -> None:
    """
    Give safetensors files, which safetensors 0.8 makes readable by their owner alone, the permissions of other new
    files (the umask's): a server of another user has to read them.

    Args:
        folder (`str` or `Path`): Folder with the files, at any depth.
    """
    mask = os.umask(0)
    os.umask(mask)
    for file in Path(folder).rglob("*.safetensors"):
        if not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~mask)


def write_text(path: str | Path, text: str) -> None:
    """[`write_bytes`] for a text, encoded as UTF-8."""
    write_bytes(path, text.encode())


def remove_temporaries(folder: str | Path, older_than: float = 3600.0) -> None:
    """
    Remove the temporary files that killed processes left in a folder (not in its subfolders).

    Args:
        folder (`str` or `Path`): A folder, which may not exist.
        older_than (`float`, *optional*, defaults to 3600.0): Minimum age in seconds; a younger file may still be in
            use.
    """
    for file in Path(folder).glob(".*.tmp"):
        try:
            if len(file.name.split(".")[-2]) == 16 and time.time() - file.lstat().st_mtime > older_than:
                file.unlink()
        except OSError:
            continue  # already removed by another process, or owned by another user


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """
    Give a helpful message if writing `path` fails because of a full disk or missing permission.

    Raises:
        DiskError: With the original `errno`, and a message with the file, the free space and the fix.
    """
    try:
        yield
    except DiskError:  # says it already
        raise
    except Exception as error:
        if is_disk_full(error):
            number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
            raise DiskError(number, f"no room: {room(path)}", str(path)) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            cause = os.strerror(error.errno or 0).lower()
            remedy = f"cannot be written ({cause}); give a folder that is writable"
            raise DiskError(error.errno, remedy, str(path)) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception from any library means that the disk is full or a quota is exceeded."""
    return getattr(error, "errno", None) in DISK_FULL or "No space left on device" in str(error)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist itself."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def check_room(path: Path, needed: int) -> None:
    """
    Check, before any compute, that the disk has room for a file or folder.

    Args:
        path (`Path`): Path to be written.
        needed (`int`): Size in bytes.

    Raises:
        OSError: If less than `needed` is free.
    """
    if free_bytes(path) < needed:
        raise OSError(errno.ENOSPC, f"no room for {needed / 2**20:.1f} MiB: {room(path)}", str(path))


def check_writable(argument: str, folder: str | Path) -> None:
    """
    Check, before any compute, that a folder, which need not exist, can be written to.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        folder (`str` or `Path`): The folder.

    Raises:
        FileExistsError: If it is a file, or lies in one.
        DiskError: If it, or the folder in which it would be made, is read-only.
    """
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise FileExistsError(f"`{argument}={folder}`: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DiskError(f"`{argument}={folder}` cannot be written to: {existing} is read-only; give another folder")


def room(path: Path) -> str:
    """Free space on the disk of a path, and the fix, for error messages."""
    return f"{free_bytes(path) / 2**20:.1f} MiB are free on its disk; free some, or write to another disk"


def plain_name(text: str, length: int = 80) -> str:
    """
    Turn a text into a name for files and log entries: letters, digits, spaces and a few punctuation marks.

    Characters with a special meaning in a path, a page or a shell and invisible characters become `_`. The name has at
    most `length` characters, and at most twice as many bytes, which file systems count.
    """
    kept = "".join(c if c.isalnum() or c in " ,;-_+()!" else "_" for c in text)
    return kept[:length].encode()[: 2 * length].decode(errors="ignore").strip() or "_"


def distinct_names(texts: Sequence[str]) -> list[str]:
    """[`plain_name`] of each text; duplicates are prefixed with their index."""
    names: list[str] = []
    for number, text in enumerate(texts):
        plain = name = plain_name(text)
        while name in names:
            name, number = plain_name(f"{number} {plain}"), number + 1
        names.append(name)
    return names


def wav_bytes(waveform: torch.Tensor, sampling_rate: int) -> bytes:
    """
    The content of a 16-bit WAV file.

    Args:
        waveform (`torch.Tensor`): Shape `(T,)`, or `(C, T)` of several channels, float samples in `[-1, 1]`, on the
            CPU.
        sampling_rate (`int`): Sampling rate in Hz.

    Returns:
        `bytes`: The file's content.

    Raises:
        ImportError: If soundfile is missing; it comes with the extra `audio`.
        ValueError: If a sample is NaN or infinite, which would be a click at full scale.
    """
    if not waveform.isfinite().all():
        raise ValueError("`waveform` has samples that are NaN or infinite, so it cannot be written as sound")
    file = io.BytesIO()
    require("soundfile", "audio").write(file, waveform.numpy().T, sampling_rate, subtype="PCM_16", format="WAV")
    return file.getvalue()


def local_name(path: str) -> str:
    """The last part of an existing local path; any other name, such as a Hub name, unchanged."""
    return Path(path).resolve().name if Path(path).exists() else path


def own_file(folder: str | Path, name: str) -> Path | None:
    """
    Path of a file in a model's folder; `None` if it does not exist.

    Links may point to other files of the folder and, in a snapshot of the Hub's cache, to the blobs of that
    repository.

    Args:
        folder (`str` or `Path`): The model's folder.
        name (`str`): Path of the file inside the folder.

    Raises:
        ValueError: If the file is a link to outside the folder, which could expose any file of this machine.
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
