"""
Merges by mergekit, which is run as a program (its licence is the LGPL), and what it leaves out.

The program ends with this process: a signal that ends this process ends it too, and where this process is killed, the
kernel ends it (`PR_SET_PDEATHSIG`, Linux).
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
from trl_drcd.merging.folders import SIDE_FILES
from trl_drcd.merging.safetensors_files import Checkpoint
from trl_drcd.validation.saved_files import INDEX, WEIGHTS

# Asks for SIGKILL at the death of the parent, unless that died before, and becomes the program
END_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
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
    As [`interpolate_checkpoints`], with the weights merged by mergekit.

    Writes a recipe as in recipes/lerp.yaml, runs `mergekit-yaml`, and then restores what it leaves out: processor,
    generation config (with guidance off), codec. Models of weight 0 are compared with the others, but not merged.

    Raises:
        ImportError: If mergekit is not installed; it comes with the extra `merge`.
        RuntimeError: If mergekit fails; the message ends with its last lines.
        FileExistsError, FileNotFoundError, ValueError: As for [`interpolate_checkpoints`].
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

    mergekit reads an index where transformers reads the single file beside it, and `@` and `+` in a path are syntax to
    it. So it gets folders of plain names with links to the checked files alone.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        views = [view_of(model, Path(scratch, f"model{number}")) for number, model in enumerate(checkpoints)]
        recipe = Path(scratch, "lerp.yaml")
        recipe.write_text(merge_recipe([str(view) for view in views], weights, dtype))
        # Without tokenizer files mergekit would ask the Hub for them
        run = run_to_its_end(
            [program, str(recipe), str(folder), "--no-write-model-card"], os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    if run.returncode:
        raise RuntimeError("mergekit-yaml failed:\n" + "\n".join(run.stderr.splitlines()[-15:]))


def view_of(model: Checkpoint, folder: Path) -> Path:
    """A folder with links to the configuration, the weights and the tokenizer of a model, and nothing else."""
    folder.mkdir()
    index = [] if WEIGHTS in model.files else [INDEX]
    for name in ["config.json", *index, *model.files, *(name for group in SIDE_FILES[:3] for name in group)]:
        if (file := own_file(model.folder, name)) is not None:
            (folder / name).symlink_to(file.resolve())
    return folder


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """
    Run a program in a process group of its own, which does not outlive this call, nor this process.

    Args:
        command (`Sequence[str]`): Path of the program, and its arguments.
        environment (`Mapping[str, str]`): Its environment variables.

    Returns:
        `subprocess.CompletedProcess`: With its output as text.
    """
    wrapped = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid()), *command]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        wrapped, env=environment, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            _end_group(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started: SIGTERM, and SIGKILL for those that it is not enough for."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def find_mergekit() -> str:
    """
    The `mergekit-yaml` of this Python environment, or else of the path.

    Raises:
        ImportError: If there is none.
    """
    program = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which("mergekit-yaml")
    if program is None:
        raise ImportError('mergekit is needed here. Install it with: pip install "trl-drcd[merge]"')
    return program
