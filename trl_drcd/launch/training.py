"""A training run: create the trainer, train, save model, card, log and samples."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_drcd.callbacks import Deadline, LogFile
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.compat.threads import use_own_cores
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import is_sharded
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.files import DiskError, disk_errors, local_name
from trl_drcd.launch.arguments import PromptArguments
from trl_drcd.launch.parts import load_rewards
from trl_drcd.launch.samples import write_samples
from trl_drcd.prompts import distinct
from trl_drcd.reliability.writer import ForeignCheckpointError
from trl_drcd.trainer import CFGDistillDiversityTrainer
from trl_drcd.validation.messages import rename_arguments

NO_FAULT_OF_CODE = (BlockingIOError, DiskError, ForeignCheckpointError)
"""Errors of a training after which a user needs no traceback."""


def peft_config(model: ModelConfig) -> PeftConfig | None:
    """TRL's `get_peft_config`, in which a single `lora_target_modules` stays a name: a text would be a pattern."""
    config: Any = get_peft_config(model)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        config.target_modules = {targets}
    found: PeftConfig | None = config
    return found


def make_trainer(
    script: PromptArguments,
    args: CFGDistillDiversityConfig,
    model: ModelConfig,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None,
    **parts: Any,
) -> CFGDistillDiversityTrainer:
    """
    Create the trainer of a script; errors name the script's arguments.

    Args:
        script ([`~trl_drcd.launch.arguments.PromptArguments`]): The script's arguments.
        args ([`CFGDistillDiversityConfig`]): Arguments of the trainer.
        model (`ModelConfig`): Arguments of the model.
        train_dataset, eval_dataset: From [`~trl_drcd.launch.parts.load_datasets`].
        **parts: Further arguments of the trainer: `embedder`, `codec`.

    Raises:
        FileNotFoundError, TypeError, ValueError: If an argument, model or data set is invalid; before any sampling.
    """
    use_own_cores()
    names = {
        "model": "model_name_or_path",
        "train_dataset": f"dataset={script.dataset}",
        "peft_config": "use_peft",
        "processing_class": "model_name_or_path",
    }
    given = {"eval_dataset": script.eval_dataset, "embedder": script.embedder}
    names |= {name: f"{name}={value}" for name, value in given.items() if value}
    with rename_arguments(names):
        return CFGDistillDiversityTrainer(
            model=str(model.model_name_or_path),
            reward_funcs=load_rewards(script.reward_funcs),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[LogFile(), *([Deadline(script.max_minutes)] if script.max_minutes else [])],
            quantization_config=get_quantization_config(model),
            peft_config=peft_config(model),
            teacher=script.teacher,
            **parts,
        )


def train_and_save(trainer: CFGDistillDiversityTrainer, script: PromptArguments) -> None:
    """
    Train, run a final evaluation if enabled, and save everything to the output folder.

    The folder gets the model with its tokenizer and a generation config without guidance, the codec, samples of
    held-out prompts and a model card, beside the log and the checkpoints.

    Args:
        trainer ([`CFGDistillDiversityTrainer`]): A trainer, for example from [`make_trainer`].
        script ([`~trl_drcd.launch.arguments.PromptArguments`]): The script's arguments.

    Raises:
        BlockingIOError: If another training runs in the output folder.
        DiskError: If the disk is full or read-only.
        ForeignCheckpointError: If the checkpoint to resume from belongs to a different run.
        RuntimeError: If no update was made because a streamed data set has fewer rows than one rollout needs.
    """
    with disk_errors(Path(str(trainer.args.output_dir))):
        _train_and_save(trainer, script)


def _train_and_save(trainer: CFGDistillDiversityTrainer, script: PromptArguments) -> None:
    args, output = trainer.args, Path(str(trainer.args.output_dir))
    keep_freed_memory()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if not trainer.state.global_step:
        raise RuntimeError(
            f"`dataset={script.dataset}` has fewer rows than one rollout needs, so no update was made and nothing was "
            "saved; give more prompts, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`"
        )
    evaluates = args.eval_strategy != "no"
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_kl" in entry]
    if evaluates and trainer.state.global_step not in evaluated[-1:]:
        trainer.evaluate()
    trainer.save_model(str(output))
    samples = _held_out_samples(trainer, script.num_samples) if script.num_samples else None
    if not trainer.accelerator.is_main_process:
        return
    shutil.rmtree(output / "samples", ignore_errors=True)
    if samples is not None:
        tokenizer: Any = trainer.processing_class
        write_samples(samples, output / "samples", tokenizer, trainer.codec)
    trainer.write_card(output, script.license, prompts=local_name(str(script.dataset)))
    for which, row in trainer.final_metrics().items():
        print(f"  {which:18s}" + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(f"Model, model card{', log and samples' if samples else ' and log'} are in {args.output_dir}")
    if args.push_to_hub:
        print(f"Pushed to {trainer.push_to_hub()}")


def _held_out_samples(trainer: CFGDistillDiversityTrainer, count: int) -> Samples | None:
    """One completion without guidance of each of the first held-out prompts; `None` except in the main process."""
    with trainer.model_for_sampling() as student:
        if trainer.accelerator.is_main_process or is_sharded(trainer.accelerator):  # if sharded, all sample
            samples = _sampled(trainer, student, count)
    return samples if trainer.accelerator.is_main_process else None


def _sampled(trainer: CFGDistillDiversityTrainer, student: PreTrainedModel, count: int) -> Samples:
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    dataset: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    return sample_prompts(
        student,
        tokenizer,
        distinct((row["prompt"] for row in dataset.take(count * args.num_generations)), count),
        temperature=args.temperature,
        max_new_tokens=args.max_completion_length,
        seed=args.seed,
        description="samples",
        chat_template_kwargs=args.chat_template_kwargs,
    )
