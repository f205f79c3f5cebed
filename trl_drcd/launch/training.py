"""What the training recipes share: their arguments, their prompts, and what a run leaves behind."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, TrlParser

from trl_drcd.distributed import is_sharded
from trl_drcd.files import local_name, write_text
from trl_drcd.launch.cards import final_metrics, model_card
from trl_drcd.prompts import distinct, load_prompts
from trl_drcd.reliability.checkpoints import find_checkpoint
from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.model_folders import check_model

# What --help shows of the arguments of TRL and transformers; --help_all shows them all
COMMON = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_completion_length", "num_generations", "temperature", "bf16", "seed"),
    *("logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    *("report_to", "on_bad_batch", "ddp_timeout"),
    *("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "guidance_scale"),
    *("negative_prompt", "diversity_coef", "diversity_warmup_steps", "sample_steps", "sample_prompts"),
}


@dataclass
class PromptArguments:
    """Prompts to train on and to evaluate on, and how long to train."""

    dataset: str | None = field(
        default=None, metadata={"help": "Prompts to train on: hub name, or JSONL, CSV or Parquet file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out prompts, likewise; evaluated and sampled from."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of a hub data set to evaluate on."})
    max_eval_prompts: int = field(default=64, metadata={"help": "Evaluate on the first so many held-out prompts."})
    num_samples: int = field(default=4, metadata={"help": "Held-out prompts to write samples of after training."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "End training after so many minutes, whatever max_steps says."}
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in {"max_eval_prompts": 1, "num_samples": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(f"`max_minutes` must be finite and above 0, got {self.max_minutes}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


def has_fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32; elsewhere it only emulates it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def parse_arguments(
    argv: list[str], script_arguments: Any, config: Any, recipe: str, description: str | None, default_config: Path
) -> Any:
    """
    The arguments of a recipe: the command line before the YAML file of `--config`, that before the defaults.

    Args:
        argv (`list[str]`): Of the command line.
        script_arguments (`type`): The recipe's own arguments, a dataclass.
        config (`type`): The trainer's, `CFGDistillDiversityConfig`.
        recipe (`str`): Name of the script in `recipes/`, without `.py`.
        description (`str`): For `--help`.
        default_config (`Path`): The YAML file of a call that names neither one nor a model.

    Returns:
        `tuple`: The recipe's arguments, the trainer's and the model's.
    """
    if not {"--config", "--model_name_or_path", "--model-name-or-path"} & {word.partition("=")[0] for word in argv}:
        argv = ["--config", os.path.relpath(default_config), *argv]
    arguments: Any = (script_arguments, config, ModelConfig)
    parser = TrlParser(
        arguments,
        prog=f"accelerate launch recipes/{recipe}.py",
        usage="%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        description=description,
        formatter_class=HelpFormatter,
    )
    defaults = {
        "output_dir": f"outputs/{recipe}",
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "use_cpu": not torch.accelerator.is_available(),  # without it transformers refuses bfloat16 on a CPU
        "bf16": has_fast_bfloat16(),
    }
    parser.set_defaults_with_config(**defaults)
    if {"-h", "--help", "--help_all"} & set(argv):
        shown = COMMON | set(script_arguments.__dataclass_fields__)
        for action in parser._actions:
            if "--help_all" not in argv and action.dest not in shown:
                action.help = argparse.SUPPRESS
        parser.print_help()
        print("\nAlso every argument of TRL's RLOOConfig and ModelConfig: --help_all lists them.")
        raise SystemExit
    return parse_command_line(parser, argv)


def check_arguments(script: Any, args: Any, model: ModelConfig, folders: dict[str, str | None]) -> None:
    """
    Finds out before anything is loaded whether the parts are there and fit together, the checkpoint among them.

    Args:
        script ([`PromptArguments`]): With a field `embedder`.
        args (`CFGDistillDiversityConfig`): The trainer's.
        model (`ModelConfig`): The model's.
        folders (`dict`): Further folders that must hold a `config.json`, by the name of their argument.

    Raises:
        FileNotFoundError: If a folder or the checkpoint is missing.
        ValueError: If an argument is missing that another one needs.
    """
    if not script.dataset:
        raise ValueError(
            "`dataset` is missing; give a hub name, or a JSONL, CSV or Parquet file with a `prompt` column"
        )
    check_model("model_name_or_path", str(model.model_name_or_path), args.trust_remote_code)
    for name, folder in folders.items():
        if folder and not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"`{name}={folder}` has no config.json; give the folder of a saved one")
    if args.diversity_coef > 0 and not script.embedder:
        raise ValueError(f"`diversity_coef={args.diversity_coef}` needs `embedder`, got None")
    if args.eval_strategy != "no" and not script.eval_dataset:
        raise ValueError(f"`eval_strategy={args.eval_strategy.value}` needs `eval_dataset`, got None")
    if args.resume_from_checkpoint:
        find_checkpoint(args.resume_from_checkpoint, args.output_dir, read=False)


def load_part(argument: str, load: Callable[[str], Any], folder: str | None) -> Any:
    """A codec or an embedder, whose errors name the argument; `None` where none is given."""
    if not folder:
        return None
    with prefix_errors(argument):
        return load(folder)


def load_datasets(script: PromptArguments, streaming: bool = False) -> tuple[Any, Any]:
    """Prompts to train on, read as they come where `streaming`, and the first held-out ones, or `None`."""
    train, held_out = load_prompts("dataset", str(script.dataset), script.dataset_split, streaming), None
    if script.eval_dataset:
        held_out = load_prompts("eval_dataset", script.eval_dataset, script.eval_split)
        held_out = held_out.select(range(min(script.max_eval_prompts, len(held_out))))
    return train, held_out


def model_init_kwargs(args: Any, model: ModelConfig) -> dict[str, Any]:
    """How the trainer loads the model."""
    given: dict[str, Any] = {"use_safetensors": True}  # what cannot run code when it is read
    given |= {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    return given | {"dtype": model.dtype} | (args.model_init_kwargs or {})


def train_and_save(
    trainer: Any,
    script: PromptArguments,
    model: ModelConfig,
    sample_prompts: Callable[..., Any],
    write_samples: Callable[[Any, Path], None],
    codec: str | None = None,
) -> None:
    """
    Trains, evaluates at the end if it evaluates at all, and fills the output folder.

    The folder gets the model with its tokenizer and a generation config without guidance, the codec, samples of
    held-out prompts and a model card, beside the log and the checkpoints.

    Args:
        trainer (`CFGDistillDiversityTrainer`): Ready to train.
        script ([`PromptArguments`]): The recipe's arguments.
        model (`ModelConfig`): The model's.
        sample_prompts (`Callable`): [`~trl_drcd.evaluation.sampling.sample_prompts`].
        write_samples (`Callable`): Writes what that returns to a folder.
        codec (`str`, *optional*): Folder of the codec, for models of audio that do not have their own.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluates = args.eval_strategy != "no"
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_kl" in entry]
    if evaluates and trainer.state.global_step not in evaluated[-1:]:
        trainer.evaluate()
    metrics = final_metrics(trainer.state.log_history, evaluates)
    output = Path(args.output_dir)
    trainer.save_model(str(output))
    samples = None
    with trainer.model_for_sampling() as student:
        if trainer.accelerator.is_main_process or is_sharded(trainer.accelerator):  # then they sample in step
            samples = _held_out_samples(trainer, student, script.num_samples, sample_prompts)
    if not trainer.accelerator.is_main_process:
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; the model card says what matters of it
    trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(output)
    if codec:
        shutil.copytree(codec, output / "codec", dirs_exist_ok=True)
    shutil.rmtree(output / "samples", ignore_errors=True)
    write_samples(samples, output / "samples")
    names = [
        *("guidance_scale", "negative_prompt", "temperature", "diversity_coef", "diversity_warmup_steps"),
        *("num_generations", "learning_rate", "max_completion_length", "bf16", "seed"),
    ]
    settings = {
        "prompts": local_name(str(script.dataset)),
        "steps": trainer.state.global_step,
        "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "LoRA rank": model.lora_r if model.use_peft else None,
    } | {name: getattr(args, name) for name in names}
    base = str(model.model_name_or_path)
    card = model_card(output.name, base, settings, metrics, trainer.codec is not None, bool(model.use_peft))
    write_text(output / "README.md", str(card))
    for which, row in metrics.items():
        print(f"  {which:18s}" + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(f"Model, model card, log and samples are in {args.output_dir}")


def _held_out_samples(trainer: Any, student: Any, count: int, sample_prompts: Callable[..., Any]) -> Any:
    """One completion, without guidance, of each of the first held-out prompts."""
    args = trainer.args
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    return sample_prompts(
        student,
        trainer.processing_class,
        distinct((row["prompt"] for row in dataset.take(count * args.num_generations)), count),
        temperature=args.temperature,
        max_new_tokens=args.max_completion_length,
        seed=args.seed,
        description="samples",
    )
