"""Atomic checkpoints: written to a staging folder, listed with sizes and checksums, then renamed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

from trl_drcd.files import write_text

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
# First parts of the names of weight files: one process, adapter, FSDP and DeepSpeed shards
WEIGHTS = ("model", "adapter_model", "pytorch_model", "global_step")
STAGING = ".incomplete"  # does not match `checkpoint-<step>`


def commit(staged: Path, final: Path, identity: dict[str, str] | None = None) -> None:
    """
    Turn a completely written folder into a checkpoint, atomically, replacing an older one of the same name.

    Adds `complete.json`, with the size in bytes and the CRC-32 of every file.

    Args:
        staged (`Path`): Folder with all files, on the same file system as `final`.
        final (`Path`): Path of the checkpoint, `checkpoint-<step>`.
        identity (`dict`, *optional*): Identity of the run, see [`~trl_drcd.reliability.identity.run_identity`].

    Raises:
        OSError: If writing fails; `final` is then unchanged.
        RuntimeError: If there is no weight file in `staged`.
    """
    names = sorted(path for path in staged.rglob("*") if path.is_file())
    files = {path.relative_to(staged).as_posix(): [path.stat().st_size, _crc32(path, sync=True)] for path in names}
    if not any(name.startswith(WEIGHTS) for name in files):
        raise RuntimeError(f"{final.name} has no weights, only {sorted(files)}; something else writes into {staged}")
    write_text(staged / MANIFEST, json.dumps({"files": files, "run": identity or {}}, indent=1))
    _sync(staged / MANIFEST)
    _sync(staged)
    replaced = staged.with_name(f"replaced-{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_identity(checkpoint: str | Path) -> dict[str, str] | None:
    """The run's identity stored by [`commit`]; `None` for a folder written by another program."""
    try:
        found = json.loads((Path(checkpoint) / MANIFEST).read_bytes()).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def why_incomplete(checkpoint: Path, read: bool = True) -> str | None:
    """
    The reason why a checkpoint is not intact; `None` if every file is unchanged since [`commit`].

    With `read=False`, only the file sizes are compared, not the checksums.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        for name, (size, checksum) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if read and _crc32(path) != checksum:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def find_checkpoint(wanted: str | bool, output_dir: str | Path, read: bool = True) -> str | None:
    """
    Resolve `resume_from_checkpoint` to a folder: `true` is the newest complete checkpoint of the output folder, and
    `auto` too if there is one.

    A folder given by name may lack `complete.json`, as another program may have written it. With `read`, the chosen
    checkpoint and the skipped ones are logged.

    Args:
        wanted (`str` or `bool`): `True`, `"true"`, `"last"`, `"auto"`, or a folder.
        output_dir (`str` or `Path`): Output folder of the run.
        read (`bool`, *optional*, defaults to `True`): Compare checksums, not only file sizes.

    Returns:
        `str` or `None`: The folder; `None` for `"auto"` if there is no complete checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint, or the given one is incomplete.
    """
    if str(wanted).lower() not in ("true", "last", "auto"):
        named = Path(str(wanted))
        problem = why_incomplete(named, read) if (named / MANIFEST).exists() else None
        if not (named / "trainer_state.json").is_file():
            problem = "it has no trainer_state.json"
        if problem:
            raise FileNotFoundError(f"`resume_from_checkpoint={wanted}` is not a complete checkpoint: {problem}")
        return str(wanted)
    skipped: list[str] = []
    for checkpoint in checkpoints(output_dir):
        problem = why_incomplete(checkpoint, read)
        if problem is None:
            because = f" (skipped {'; '.join(skipped)})" if skipped else ""
            logger.log(
                logging.WARNING if read else logging.DEBUG,
                f"Resuming from {checkpoint}, the newest complete checkpoint{because}",
            )
            return str(checkpoint)
        skipped.append(f"{checkpoint.name}: {problem}")
    because = f" that is complete ({'; '.join(skipped)})" if skipped else ""
    if str(wanted).lower() == "auto":
        if read and skipped:
            logger.warning(f"This training starts afresh: {output_dir} holds no checkpoint{because}")
        return None
    raise FileNotFoundError(
        f"`resume_from_checkpoint={wanted}`: {output_dir} holds no checkpoint{because}; start without "
        "`resume_from_checkpoint`, or with `auto`"
    )


def earlier_run(output_dir: str | Path) -> str | None:
    """A sentence, if a training that starts afresh would mix its checkpoints with complete ones in `output_dir`."""
    complete = (found for found in checkpoints(output_dir) if why_incomplete(found, read=False) is None)
    if (newest := next(complete, None)) is None:
        return None
    return (
        f"`output_dir={output_dir}` holds {newest.name} of an earlier run: go on from it with "
        "`resume_from_checkpoint=True`, or give another `output_dir`"
    )


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders `checkpoint-<step>`, latest step first."""
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: -_step(path))


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """
    Delete checkpoints until `limit` are left: incomplete ones first, then those of an earlier run, then the oldest.

    Args:
        output_dir (`Path`): Folder of the checkpoints.
        limit (`int`, *optional*): `save_total_limit`; nothing is deleted if `None` or 0.
        keep (`set[Path]`): Checkpoints that are never deleted: the newest and the best one.
    """
    found = checkpoints(output_dir)  # latest step first
    newest = max(_step(checkpoint) for checkpoint in keep)
    found.sort(key=lambda c: (why_incomplete(c, read=False) is None, _step(c) <= newest), reverse=True)
    others = [checkpoint for checkpoint in found if checkpoint not in keep]
    if limit:
        for checkpoint in others[max(0, limit - len(keep)) :]:
            shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _crc32(path: Path, sync: bool = False) -> int:
    """CRC-32 of a file's content; with `sync`, the content is flushed to disk first."""
    checksum = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
