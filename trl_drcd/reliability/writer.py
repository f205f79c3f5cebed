"""Atomic checkpoints of a training run, on any number of processes."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments

from trl_drcd.files import DiskError, disk_errors
from trl_drcd.locks import only_process
from trl_drcd.reliability.checkpoints import (
    STAGING,
    checkpoints,
    commit,
    earlier_run,
    find_checkpoint,
    read_identity,
    rotate,
)
from trl_drcd.reliability.identity import identity_problem
from trl_drcd.reliability.processes import report_status

logger = logging.getLogger(__name__)


class ForeignCheckpointError(ValueError):
    """The checkpoint to resume from belongs to a different run."""


class CheckpointWriter:
    """
    Makes a trainer write its checkpoints to `<output_dir>/.incomplete` first.

    Once all processes have written their files, these are listed with their checksums, and the folder is renamed to
    `checkpoint-<step>`. Older checkpoints are deleted only afterwards.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        accelerator (`Accelerator`): The trainer's accelerator.

    Attributes:
        saved_step (`int`): Step of the newest checkpoint that this run wrote or resumed from.
        resumed_step (`int`): Step of the checkpoint that this run resumed from; 0 for a new run.
        identity (`dict`): [`~trl_drcd.reliability.identity.run_identity`], stored in each checkpoint.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.saved_step = 0
        self.resumed_step = 0
        self.staging = False
        self.identity: dict[str, str] = {}

    def place(self, folder: str) -> str:
        """The folder to write to instead of `folder`: the staging folder while a checkpoint is written."""
        return str(Path(folder, STAGING)) if self.staging else folder

    @contextmanager
    def writing(self, run: Path, state: TrainerState) -> Iterator[Path]:
        """
        Yield the folder into which the trainer writes a checkpoint; on exit, commit it as `run / "checkpoint-<step>"`.

        Raises:
            DiskError: If writing fails; the message gives the free disk space and the checkpoint to resume from.
        """
        name = f"checkpoint-{state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.staging = True
        report_status("it writes a checkpoint")
        try:
            yield run / STAGING / name
            self.commit(run / STAGING / name, run / name, state)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            raise DiskError(_disk_message(run, name, error)) from error
        finally:
            self.staging = False
        self.saved_step = state.global_step

    def commit(self, staged: Path, final: Path, state: TrainerState) -> None:
        """Commit the folder once all processes have written their files."""
        moved = state.best_model_checkpoint == str(staged)
        if moved:
            state.best_model_checkpoint = str(final)
        report_status("it has written its part of a checkpoint")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if moved:
                state.save_to_json(str(staged / "trainer_state.json"))
            commit(staged, final, self.identity)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """
        Lock the output folder against other training runs.

        Raises:
            BlockingIOError: On every process, if another run holds the lock.
        """
        with ExitStack() as stack:
            problem: list[Any] = [None]
            if self.accelerator.is_main_process:
                try:
                    stack.enter_context(only_process(str(self.args.output_dir), "a training"))
                except BlockingIOError as error:
                    problem = [error]
            broadcast_object_list(problem)
            if problem[0] is not None:
                raise problem[0]
            yield

    def resolve(self, wanted: str | bool | None) -> str | None:
        """
        Resolve `resume_from_checkpoint` to a folder, the same on every process; see [`find_checkpoint`].

        Raises:
            FileNotFoundError: On every process, if there is no complete checkpoint.
            ForeignCheckpointError: On every process, if the checkpoint belongs to a different run.
        """
        self.resumed_step = 0
        if not wanted:
            if self.accelerator.is_main_process and (problem := earlier_run(str(self.args.output_dir))):
                logger.warning(f"This training starts afresh: {problem}")
            return None
        found: list[Any] = [None, 0, None]
        if self.accelerator.is_main_process:
            try:
                if folder := find_checkpoint(wanted, str(self.args.output_dir)):
                    state = TrainerState.load_from_json(str(Path(folder, "trainer_state.json")))
                    found = [folder, state.global_step, None]
                    if problem := identity_problem(read_identity(folder), self.identity):
                        remedy = "use the settings that it was trained with, or another `output_dir`"
                        found[2] = ForeignCheckpointError(f"{folder} cannot be resumed from: {problem}; {remedy}")
            except FileNotFoundError as error:
                found = [None, 0, error]
        checkpoint, self.resumed_step, problem = broadcast_object_list(found)
        if problem is not None:
            raise problem
        return checkpoint

    @contextmanager
    def finishing(self, folder: str | Path, step: int) -> Iterator[None]:
        """
        Explain a disk that fails after the last update: nothing is lost that a checkpoint has.

        Raises:
            DiskError: The message gives the free disk space, and where the state is.
        """
        try:
            with disk_errors(Path(folder)):
                yield
        except DiskError as error:
            raise DiskError(
                f"{folder} could not be written ({error.strerror or error}). {self.where(step)}"
            ) from error

    def where(self, step: int, which: str = "") -> str:
        """A sentence: where the state`which` after `step` updates is, and how to resume from it."""
        if self.saved_step != step:
            return "Nothing is saved, as `save_strategy='no'` says"
        if which and step == 0:
            return "Nothing was learned before"
        folder = Path(str(self.args.output_dir), f"checkpoint-{step}")
        return f"The state{which} is in {folder}: `resume_from_checkpoint=True` goes on from there"

    def rotate(self, run: Path, state: TrainerState) -> None:
        """Delete the staging folder, and the checkpoints beyond `save_total_limit`."""
        if self.args.should_save:
            newest = run / f"checkpoint-{self.saved_step}"
            shutil.rmtree(run / STAGING, ignore_errors=True)
            rotate(run, self.args.save_total_limit, {newest, Path(state.best_model_checkpoint or newest)})


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error is a failed write; torch raises an unspecific `RuntimeError` for it."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, (OSError, SafetensorError)) or where == Path(torch.serialization.__file__)


def _disk_message(run: Path, name: str, error: Exception) -> str:
    """The error message: cause, free disk space, and checkpoint to resume from. Deletes the staging folder."""
    free = shutil.disk_usage(run).free / 2**20
    shutil.rmtree(run / STAGING, ignore_errors=True)
    older = checkpoints(run)
    kept = f"{older[0].name} and older ones are untouched" if older else "there is no checkpoint yet"
    return (
        f"{name} could not be written to {run}, where {free:.1f} MiB were free ({type(error).__name__}: {error}); "
        f"{kept}. Make room, or lower `save_total_limit`, and go on with `resume_from_checkpoint=True`"
    )
