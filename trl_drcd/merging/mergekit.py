"""
Merge with mergekit, run as a separate program (it is under the LGPL), and restore the files that it leaves out.

The program does not outlive this process: it is terminated when this process ends by a signal, and on Linux the kernel
kills it if this process is killed (`PR_SET_PDEATHSIG`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from trl_drcd.files import own_file
from trl_drcd.merging.cards import merge_recipe
from trl_drcd.merging.checkpoints import merge_folders
from trl_drcd.merging.folders import SIDE_FILES, listed
from trl_drcd.merging.safetensors_files import Checkpoint
from trl_drcd.validation.saved_files import INDEX, WEIGHTS, read_json, weight_files

# Request SIGKILL on the parent's death, exit if the parent has died already, then exec the program
END_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
# Model types for which mergekit 0.1.5 fails: it asks for their token embeddings, which transformers does not name
UNREADABLE = {"dia"}
PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL


def merge_with_mergekit(
    models: Sequence[str | Path],
    weights: Sequence[float],
    output_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> Path:
    """
    Like [`interpolate_checkpoints`], with the weights merged by mergekit.

    Writes a recipe as in recipes/lerp.yaml, runs `mergekit-yaml`, and then restores the files that it leaves out:
    processor, generation config (with guidance off), codec. Models of weight 0 are checked, but not merged. Arguments
    and return value are those of [`interpolate_checkpoints`].

    Raises:
        ImportError: If mergekit is not installed (extra `merge`).
        RuntimeError: If mergekit fails, with the last lines of its output; or as for [`interpolate_checkpoints`].
        FileExistsError, FileNotFoundError, OSError, TypeError, ValueError: As for [`interpolate_checkpoints`].
    """
    run = partial(_write_weights, program=find_mergekit(), dtype=dtype)
    return merge_folders(models, weights, output_dir, run, dtype, overwrite, verify)


def _write_weights(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    weights: Sequence[float],
    folder: Path,
    program: str,
    dtype: str | None,
) -> None:
    """
    Run mergekit on the files that were checked.

    mergekit prefers an index where transformers reads the single file beside it, and parses `@` and `+` in paths. So
    it gets folders with plain names, relative to its working directory, that contain only links to the checked files.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        views = [view_of(model, Path(scratch, f"model{number}")) for number, model in enumerate(checkpoints)]
        Path(scratch, "lerp.yaml").write_text(merge_recipe([view.name for view in views], weights, dtype))
        # Without tokenizer files mergekit would request them from the Hub
        run = run_to_its_end(
            [program, "lerp.yaml", str(folder.absolute()), "--no-write-model-card"],
            os.environ | {"HF_HUB_OFFLINE": "1"},
            scratch,
        )
    if run.returncode:
        raise RuntimeError("mergekit-yaml failed:\n" + "\n".join(run.stderr.splitlines()[-15:]))
    if missing := [name for name in weight_files(folder) if not (folder / name).is_file()]:
        raise RuntimeError(f"mergekit-yaml has not written {missing[0]}")


def view_of(model: Checkpoint, folder: Path) -> Path:
    """Create a folder that contains only links to the configuration, weights and side files of a model."""
    folder.mkdir()
    index = [] if WEIGHTS in model.files else [INDEX]
    others = listed(model.folder, [name for group in SIDE_FILES[:3] for name in group])
    for name in ["config.json", *index, *model.files, *others]:
        if (file := own_file(model.folder, name)) is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(file.resolve())
    return folder


def run_to_its_end(
    command: Sequence[str], environment: Mapping[str, str], cwd: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run a program in its own process group, which outlives neither this call nor this process.

    Args:
        command (`Sequence[str]`): Path of the program, and its arguments.
        environment (`Mapping[str, str]`): Its environment variables.
        cwd (`str` or `Path`, *optional*): Its working directory; that of this process if `None`.

    Returns:
        `subprocess.CompletedProcess`: With stdout and stderr as text.
    """
    wrapped = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid()), *command]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        wrapped, env=environment, cwd=cwd, stdout=pipe, stderr=pipe, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate()
        except BaseException:
            _end_group(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process group with SIGTERM, then SIGKILL for processes that ignore it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def mergekit_reads(folder: Path) -> bool:
    """Whether mergekit can merge models like the one in a folder; [`interpolate_checkpoints`] can in any case."""
    config = folder / "config.json"
    return not config.is_file() or read_json(config).get("model_type") not in UNREADABLE


def find_mergekit() -> str:
    """
    Path of `mergekit-yaml` in this Python environment, else on `PATH`.

    Raises:
        ImportError: If it is not installed.
    """
    program = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which("mergekit-yaml")
    if program is None:
        raise ImportError('mergekit is not installed. Install it with: pip install "trl-drcd[merge]"')
    return os.path.abspath(program)
