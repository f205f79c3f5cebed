"""Merges by mergekit, which is run as a program (its licence is the LGPL), and what it leaves out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trl_drcd.merging.cards import merge_recipe
from trl_drcd.merging.checkpoints import merge_folders
from trl_drcd.merging.safetensors_files import Checkpoint


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
    program = find_mergekit()

    def write(checkpoints: list[Checkpoint], names: list[str], values: list[float], folder: Path) -> None:
        recipe = merge_recipe([str(model.folder.resolve()) for model in checkpoints], values, dtype)
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "lerp.yaml").write_text(recipe)
            command = [program, str(Path(scratch, "lerp.yaml")), str(folder), "--no-write-model-card"]
            # Without tokenizer files mergekit would ask the hub for them
            run = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError("mergekit-yaml failed:\n" + "\n".join(run.stderr.splitlines()[-15:]))

    return merge_folders(models, weights, output_dir, write, dtype, overwrite, verify)


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
