"""
Write an output folder atomically: it appears complete or not at all, and no other folder is lost.

The result is written to a staging folder with a random name beside the output folder. If the output name is free, one
`rename` publishes it; if a folder is replaced, the two folders are exchanged in one step (`renameat2`, Linux), so the
name always refers to a complete folder. Where an exchange is not supported (macOS, Windows, some network and FUSE
mounts), two renames are used: a kill between them leaves the old folder under a temporary name, and the next merge to
the same output restores it.

A lock file, `.NAME.lock`, prevents two processes from writing the same folder. The kernel releases the lock when its
process ends for any reason, so the holder of the lock may remove staging folders of that name: their owners are dead.
Where file locks are not supported (Windows, some network mounts) there is no lock, and stale staging folders remain.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from trl_drcd.files import check_room, disk_errors, open_to_readers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STAGING, REPLACED = "merging", "replaced"
LONGEST_NAME = 220  # bytes, of the 255 of most file systems: temporary names are longer
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
AT_FDCWD, RENAME_EXCHANGE = -100, 2

Contents = dict[str, tuple[int, int, int]]


@contextmanager
def new_folder(
    output_dir: str | Path, parents: Sequence[Path], overwrite: bool, needed_bytes: int = 0
) -> Iterator[Path]:
    """
    A staging folder that becomes `output_dir` if the block succeeds, and is removed if it raises.

    Its parent folder is private to this call and removed at the end; use it for other temporary files. SIGTERM and
    SIGHUP end the block like Ctrl-C. If something else appears or changes at `output_dir` in the meantime, it is left
    untouched and the finished result is kept in a folder beside it, which the error names.

    Args:
        output_dir (`str` or `Path`): The folder to write. If it is a link to a folder, its target is replaced.
        parents (`Sequence[Path]`): Folders that must not be overwritten.
        overwrite (`bool`): Whether a folder that is not empty may be replaced.
        needed_bytes (`int`, *optional*, defaults to 0): Size of the result.

    Raises:
        FileExistsError: If `output_dir` is not empty and `overwrite` is not set, is a file, is being written by
            another process, or changed in the meantime.
        OSError: If the disk is too full or not writable.
        ValueError: If `output_dir` is one of the parents, contains one, or is a mount point.
    """
    output = Path(os.path.realpath(output_dir))
    _check_output(output_dir, output, parents, overwrite)
    with disk_errors(Path(output_dir)):
        check_room(output, needed_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        with _unwound_by_signals(), _locked(output):
            _clean_up(output)
            _check_output(
                output_dir, output, parents, overwrite
            )  # the previous holder of the lock may have written it
            before = contents(output)
            private = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=f".{STAGING}", dir=output.parent))
            try:
                staging = private / "result"
                staging.mkdir()
                yield staging
                _publish(staging, output, before)
            finally:
                shutil.rmtree(private, ignore_errors=True)


def _check_output(given: str | Path, output: Path, parents: Sequence[Path], overwrite: bool) -> None:
    """Check that an output folder may be written, before anything is computed."""
    for parent in parents:
        if output in (parent.resolve(), *parent.resolve().parents):
            raise ValueError(f"`output_dir={given}` contains the input model {parent}; give another folder")
    if (size := len(os.fsencode(output.name))) > LONGEST_NAME:
        raise ValueError(f"`output_dir`: the name {output.name} has {size} bytes; give one of at most {LONGEST_NAME}")
    if output.is_file():
        raise FileExistsError(f"`output_dir={given}` is a file; give a folder")
    if output.is_mount():
        raise ValueError(
            f"`output_dir={given}` is a mount point, which cannot be replaced by a rename; give a folder inside it"
        )
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"`output_dir={given}` is not empty; give another folder, or set `overwrite`")


# ---------------------------------------------------------------- publishing


def contents(folder: Path) -> Contents | None:
    """Inode, size in bytes and modification time in ns of a folder and everything in it; `None` without a folder."""
    if not folder.is_dir():
        return None
    found: Contents = {}
    for root, folders, files in os.walk(folder):
        for path in [Path(root), *(Path(root, name) for name in [*folders, *files])]:
            with suppress(FileNotFoundError):  # removed meanwhile, which shows as a difference between listings
                status = path.lstat()
                found[str(path.relative_to(folder))] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _publish(staging: Path, output: Path, before: Contents | None) -> None:
    """Move the result to `output`, provided that `output` has not changed since the start."""
    open_to_readers(staging)
    _synchronise(staging)
    if contents(output) != before:
        _keep(staging, output)
    if before is None or len(before) == 1:  # no folder, or an empty one
        try:
            os.rename(staging, output)  # can only replace an empty folder
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                _keep(staging, output)
            raise
        return
    _swap(staging, output)
    if contents(staging) != before:  # written to between the comparison and the exchange
        _swap(staging, output)
        _keep(staging, output)


def _swap(staging: Path, output: Path) -> None:
    """Exchange two folders of the same file system, in one step if supported, else by renames."""
    try:
        exchange(staging, output)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.{REPLACED}")
        os.rename(output, aside)
        try:
            os.rename(staging, output)
        except OSError:
            os.rename(aside, output)
            raise
        os.rename(aside, staging)


def exchange(first: Path, second: Path) -> None:
    """
    Exchange the names of two folders in one step.

    Raises:
        OSError: With an `errno` in `NO_EXCHANGE` if it is not supported; otherwise as for `rename`.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "the system cannot exchange two folders")
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))


def _keep(staging: Path, output: Path) -> NoReturn:
    """
    Move the result to a free name beside `output_dir`.

    Raises:
        FileExistsError: Always; it names the folder.
    """
    kept = output.with_name(f"{output.name}-{secrets.token_hex(4)}")
    os.rename(staging, kept)
    raise FileExistsError(
        f"`output_dir={output}` appeared or changed while the merge ran, and was left untouched; the finished merge "
        f"is in {kept}: rename it, or merge again with `overwrite`"
    )


def _synchronise(folder: Path) -> None:
    """Flush all files to disk, so that a power failure cannot leave incomplete files under the final name."""
    for root, _, files in os.walk(folder):
        for path in [*(Path(root, name) for name in files), *([Path(root)] if os.name == "posix" else [])]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# ---------------------------------------------------------------- other processes


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder; the lock file is removed at the end."""
    path = output.with_name(f".{output.name}.lock")
    descriptor = _acquire(path, output)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is released: see `_acquire`
            os.close(descriptor)


def _acquire(path: Path, output: Path) -> int | None:
    """
    Create and lock the lock file; return its descriptor, or `None` if file locks are not supported.

    Raises:
        FileExistsError: If another process or thread holds the lock.
    """
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if path.lstat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"`output_dir={output}` is being written by another merge; wait for it, or give another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(descriptor)  # the previous holder has removed this file: try again with a new one
    return None


def _clean_up(output: Path) -> None:
    """With the lock held, remove staging folders of killed merges, and restore a folder that they moved aside."""
    if fcntl is None:
        return
    for path in output.parent.glob(f".{glob.escape(output.name)}.*"):
        if re.fullmatch(rf"[a-z0-9_]{{8}}\.({STAGING}|{REPLACED})", path.name.removeprefix(f".{output.name}.")):
            if path.suffix == f".{REPLACED}" and not output.exists():
                os.rename(path, output)
            else:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `SystemExit` with the exit code of the signal, so that `finally` runs."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # only the main thread can set handlers
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")] if main else []
    chosen = [number for number in numbers if number and signal.getsignal(number) == signal.SIG_DFL]
    for number in chosen:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)
