"""Callbacks of a training run: samples of fixed prompts in the logging backends, a log file, a deadline."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from trl import RLOOTrainer

from trl_drcd.diversity import one_channel
from trl_drcd.files import distinct_names, write_text

logger = logging.getLogger(__name__)


class SampleCallback(TrainerCallback):
    """
    Logs one completion of each fixed prompt every `sample_steps` steps, with the same random numbers each time.

    Logs to those of TensorBoard, Weights & Biases and trackio that are in `report_to`: audio if there is a codec, else
    text.

    Args:
        trainer (`CFGDistillDiversityTrainer`): Provides the model, tokenizer and arguments.
        codec (*optional*): Decodes completion ids to audio.
    """

    def __init__(self, trainer: RLOOTrainer, codec: Any = None):
        self.trainer = trainer
        self.codec = codec
        self.prompts = trainer.args.sample_prompts or _first_prompts(trainer)
        texts = [prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for prompt in self.prompts]
        self.names = distinct_names(texts)  # backends use them as file names

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.sample_steps == 0:
            samples = self._sample()
            if self.trainer.accelerator.is_main_process:
                self._log(samples, state.global_step)

    def _sample(self) -> list:
        trainer = self.trainer
        prompt_ids, _, _ = trainer._tokenize_prompts(self.prompts)
        # Sampling must not change the random state of training
        devices = [torch.cuda.current_device()] if trainer.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(trainer.args.seed)
            ids = trainer.sample([list(p) for p in prompt_ids])
            if self.codec is None:
                return trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
            return one_channel(self.codec.decode(ids))

    def _log(self, samples: list, step: int):
        report_to = self.trainer.args.report_to or []
        if "tensorboard" in report_to:
            writer = next(
                (c.tb_writer for c in self.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)),
                None,
            )
            for name, sample in zip(self.names, samples, strict=True):
                if writer is not None and self.codec:
                    writer.add_audio(f"samples/{name}", sample[0][None], step, sample_rate=sample[1])
                elif writer is not None:
                    writer.add_text(f"samples/{name}", sample, step)
        for name in ("wandb", "trackio"):
            if name in report_to:
                self._log_to(__import__(name), samples, step)

    def _log_to(self, backend: Any, samples: list, step: int):
        entries: dict[str, Any] = {"train/global_step": step}  # the x-axis that transformers logs with
        for name, sample in zip(self.names, samples, strict=True):
            if self.codec:
                entries[f"samples/{name}"] = backend.Audio(sample[0].numpy(), sample_rate=sample[1])
            else:
                entries[f"samples/{name}"] = sample
        backend.log(entries)


def _first_prompts(trainer: RLOOTrainer, count: int = 2) -> list:
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    rows = iter(dataset)
    return [row["prompt"] for row, _ in zip(rows, range(count), strict=False)]


class WarmupCheck(TrainerCallback):
    """Warns if the run ends before `diversity_coef` reaches its full value."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        reached = args.diversity_coef_at(state.max_steps - 1, state.max_steps)
        if state.is_world_process_zero and reached < args.diversity_coef:
            warmup, steps = args.diversity_warmup_steps, state.max_steps
            few = f"`diversity_warmup_steps={warmup}` are more than the {steps} steps of this run"
            remedy = "give fewer, or a share of the run, such as 0.3"
            if 0 < warmup < 1:
                whole = args.diversity_warmup(steps)
                few = f"`diversity_warmup_steps={warmup}` of a run of `max_steps={steps}` is {whole}"
                remedy = "give more steps"
            logger.warning(f"{few}: it ends with {reached:.4g} of `diversity_coef={args.diversity_coef:g}`; {remedy}")


class LogFile(TrainerCallback):
    """Keeps `log.jsonl` in the output folder up to date: one JSON object per entry of the log."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:  # a resumed run drops the lines after its checkpoint and logs them again
            write_text(self._file(args), "".join(map(self._line, state.log_history)))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            with self._file(args).open("a") as file:
                file.write(self._line(state.log_history[-1]))

    def _file(self, args: Any) -> Path:
        return Path(args.output_dir) / "log.jsonl"

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps(entry, default=float) + "\n"


class Deadline(TrainerCallback):
    """Stops training after the given minutes, at the end of the current step."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if time.monotonic() > self.end:
            control.should_training_stop = True
