"""RLOO whose resumed run ends where an uninterrupted one does."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from trl_drcd.reliability.checkpoints import STAGING, checkpoints, commit, find_checkpoint, rotate
from trl_drcd.reliability.processes import doing


class EpochSampler(Sampler):
    """
    TRL's `RepeatSampler`, whose order also a process that starts in a later epoch knows.

    Args:
        sampler (`RepeatSampler`): Shuffles anew at each epoch, by one generator.
        trainer (`Trainer`): Whose state says which epoch it is.
    """

    def __init__(self, sampler: RepeatSampler, trainer: Any) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int(self.trainer.state.epoch or 0)):  # one draw per epoch
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)


class ResumableRLOOTrainer(RLOOTrainer):
    """
    RLOO with checkpoints that are complete or not there, on any number of processes, and hold all that the next update
    needs.

    transformers writes into `<output_dir>/.incomplete`. When the files of all processes are there, they are listed
    with their checksums, and the folder is renamed to `checkpoint-<step>`; only then are older ones deleted. What TRL
    leaves out of its checkpoints is added: the completions of a rollout that serves more updates than are done, and
    the order of the prompts in later epochs.
    """

    _staging = False
    _saved_step = 0  # of the newest checkpoint that this run wrote or started from

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint=True` is the newest complete checkpoint of `output_dir`."""
        if resume_from_checkpoint:
            found: list[Any] = [None, None]
            if self.accelerator.is_main_process:
                try:
                    found[0] = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
                except FileNotFoundError as error:
                    found[1] = str(error)
            resume_from_checkpoint, problem = broadcast_object_list(found)
            if problem:
                raise FileNotFoundError(problem)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---------------------------------------------------------------- writing

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        doing("it writes a checkpoint")
        try:
            super()._save_checkpoint(model, trial)
            self._save_rollout(run / STAGING / name)
            self._finish_checkpoint(run / STAGING / name, run / name)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            raise OSError(_about_the_disk(run, name, error)) from error
        finally:
            self._staging = False
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
            rotate(run, self.args.save_total_limit, {run / name, Path(self.state.best_model_checkpoint or run / name)})

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        """From the folder that is written to the checkpoint, once all processes have written."""
        moved = self.state.best_model_checkpoint == str(staged)
        if moved:
            self.state.best_model_checkpoint = str(final)
        doing("it has written its part of a checkpoint")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if moved:
                self.state.save_to_json(str(staged / "trainer_state.json"))
            commit(staged, final)

    def _save_rollout(self, folder: Path) -> None:
        """The completions that are sampled but not used up, where a rollout serves several updates."""
        used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if used_up or self._buffered_inputs is None:
            return
        batches: list[dict[str, torch.Tensor]] = self._buffered_inputs
        tensors = {
            f"{number}.{name}": tensor.contiguous()
            for number, batch in enumerate(batches)
            for name, tensor in batch.items()
        }
        metadata = {"step": str(self._step), "processes": str(self.accelerator.num_processes)}
        save_file(tensors, folder / f"rollout_{self.accelerator.process_index}.safetensors", metadata)

    # ---------------------------------------------------------------- reading

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._saved_step = self.state.global_step
        file = Path(checkpoint or "", f"rollout_{self.accelerator.process_index}.safetensors")
        if checkpoint is None or not file.is_file():
            return
        with safe_open(file, framework="pt", device=str(self.accelerator.device)) as tensors:
            metadata = tensors.metadata()
            if metadata["processes"] != str(self.accelerator.num_processes):
                return
            self._step = int(metadata["step"])
            batches: list[dict[str, torch.Tensor]] = [{} for _ in range(self.args.steps_per_generation)]
            for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
                number, name = key.split(".", 1)
                batches[int(number)][name] = tensors.get_tensor(key)
            self._buffered_inputs = batches

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return EpochSampler(super()._get_train_sampler(dataset), self)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed; what torch raises then is a `RuntimeError` that does not say so."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, (OSError, SafetensorError)) or where == Path(torch.serialization.__file__)


def _about_the_disk(run: Path, name: str, error: Exception) -> str:
    """What failed, how much room there was, and what there is to go on from; makes room."""
    free = shutil.disk_usage(run).free / 2**20
    shutil.rmtree(run / STAGING, ignore_errors=True)
    older = checkpoints(run)
    kept = f"{older[0].name} and older ones are untouched" if older else "there is no checkpoint yet"
    return (
        f"{name} could not be written to {run}, where {free:.1f} MiB were free ({type(error).__name__}: {error}); "
        f"{kept}. Make room, or lower `save_total_limit`, and go on with `resume_from_checkpoint=True`"
    )
