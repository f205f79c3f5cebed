"""Checkpoints that are complete or not there: written aside, listed with sizes and checksums, then renamed."""

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
# Of one process, of an adapter, of FSDP and DeepSpeed in parts
WEIGHTS = ("model", "adapter_model", "pytorch_model", "global_step")
STAGING = ".incomplete"  # no name that anybody takes for a checkpoint


def commit(staged: Path, final: Path, identity: dict[str, str] | None = None) -> None:
    """
    Turn a folder that is written to the end into a checkpoint, in one step; an older one of that name is replaced.

    Args:
        staged (`Path`): All files are there; on the file system of `final`.
        final (`Path`): `checkpoint-<step>`, with `complete.json` in it: size in bytes and CRC-32 of every file.
        identity (`dict`, *optional*): Of the run, see [`~trl_drcd.reliability.identity.run_identity`].

    Raises:
        OSError: If the disk does not take it; `final` is then as it was.
        RuntimeError: If no weights are among the files.
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
    """What [`commit`] was told of the run; `None` for a folder that another program has written."""
    try:
        found = json.loads((Path(checkpoint) / MANIFEST).read_bytes()).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def why_incomplete(checkpoint: Path, read: bool = True) -> str | None:
    """
    What is wrong with a checkpoint; `None` if every file is as it was when the checkpoint was complete.

    Where `read` is `False` only the files' sizes are looked at.
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
                return f"{name} has other content than what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def find_checkpoint(wanted: str | bool, output_dir: str | Path, read: bool = True) -> str:
    """
    The folder that `resume_from_checkpoint` means: `true` is the newest complete checkpoint of the output folder.

    A folder that is named is taken also without a `complete.json`: another program may have written it. Which one is
    taken, and what was skipped, goes to the log; a first look, without `read`, says nothing.

    Raises:
        FileNotFoundError: If there is none, or the one that is named is not whole.
    """
    if str(wanted).lower() not in ("true", "last"):
        named = Path(str(wanted))
        problem = why_incomplete(named, read) if (named / MANIFEST).exists() else None
        if not (named / "trainer_state.json").is_file():
            problem = "it has no trainer_state.json"
        if problem:
            raise FileNotFoundError(f"`resume_from_checkpoint={wanted}` is no complete checkpoint: {problem}")
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
    raise FileNotFoundError(
        f"`resume_from_checkpoint={wanted}`: {output_dir} holds no checkpoint{because}; start without "
        "`resume_from_checkpoint`"
    )


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders `checkpoint-<step>`, the last step first."""
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: -_step(path))


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """
    Deletes checkpoints until `limit` are left: first torn ones, then what an earlier run left, then the oldest.

    Args:
        output_dir (`Path`): Where they are.
        limit (`int`, *optional*): `save_total_limit`; nothing is deleted if `None` or 0.
        keep (`set[Path]`): The newest and the best one, which stay.
    """
    found = checkpoints(output_dir)  # the last step first
    newest = max(_step(checkpoint) for checkpoint in keep)
    found.sort(key=lambda c: (why_incomplete(c, read=False) is None, _step(c) <= newest), reverse=True)
    others = [checkpoint for checkpoint in found if checkpoint not in keep]
    if limit:
        for checkpoint in others[max(0, limit - len(keep)) :]:
            shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _crc32(path: Path, sync: bool = False) -> int:
    """Of the file's content; with `sync` the content is on the disk when this returns."""
    checksum = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """What the file or folder holds is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
