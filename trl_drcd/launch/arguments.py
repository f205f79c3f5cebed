"""Arguments of a training script: the command line overrides a YAML file, which overrides the defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from trl import ModelConfig, TrlParser

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.precision import has_fast_bfloat16
from trl_drcd.reliability.checkpoints import earlier_run, find_checkpoint
from trl_drcd.validation.command_line import parse_command_line, refuse_bare_file
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.ranges import Range, check_ranges

# Arguments of TRL and transformers that --help shows; --help_all shows all of them
COMMON = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_completion_length", "num_generations", "temperature", "bf16", "seed"),
    *("logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    *("report_to", "on_bad_batch", "ddp_timeout", "reward_weights"),
    *("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "guidance_scale"),
    *("early_steps", "early_guidance_scale", "negative_prompt", "allowed_token_ids", "diversity_coef"),
    *("diversity_warmup_steps", "sample_steps", "sample_prompts"),
}


@dataclass
class PromptArguments:
    """Arguments of a training script: prompts, rewards, duration, and entries of the model card."""

    dataset: str | None = field(
        default=None, metadata={"help": "Prompts to train on: Hub name, or JSONL, CSV or Parquet file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out prompts for evaluation and samples; given like `dataset`."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of a Hub data set to evaluate on."})
    max_eval_prompts: int = field(default=64, metadata={"help": "Largest number of held-out prompts to evaluate on."})
    embedder: str | None = field(
        default=None,
        metadata={"help": "E, required if diversity_coef is above 0: folder, Hub name, or `module.function`."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Further rewards: each a `module.function` with TRL's signature, or a reward model's name."},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Model or adapter whose guidance is distilled, if not the initial model: folder or Hub name, with "
            "the same vocabulary."
        },
    )
    num_samples: int = field(
        default=4, metadata={"help": "Number of held-out prompts to sample after training; 0 for none."}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop training after this many minutes, even before max_steps."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence in the model card; by default that of the base's card."}
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(
            self, {"max_eval_prompts": Range(1), "num_samples": Range(0), "max_minutes": Range(0, above=True)}
        )
        if not self.dataset:
            raise ValueError(
                "`dataset` is missing; give a Hub name, or a JSONL, CSV or Parquet file with a `prompt` column"
            )


Script = TypeVar("Script", bound=PromptArguments)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and shows defaults."""


def parse_training_arguments(
    argv: Sequence[str],
    script_arguments: type[Script],
    program: str,
    output_dir: str,
    description: str | None = None,
    default_config: Path | None = None,
) -> tuple[Script, CFGDistillDiversityConfig, ModelConfig]:
    """
    Parse and validate the arguments of a training script, before anything is loaded.

    Args:
        argv (`Sequence[str]`): The command line.
        script_arguments (`type`): The script's own arguments, a dataclass that inherits from [`PromptArguments`].
        program (`str`): Name of the script in messages.
        output_dir (`str`): Default output folder.
        description (`str`, *optional*): Description in `--help`.
        default_config (`Path`, *optional*): YAML file to use if the command line has neither one nor a model.

    Returns:
        `tuple`: The arguments of the script, the trainer and the model; `args.model_init_kwargs` are set for loading.

    Raises:
        FileExistsError: If a run is to start afresh in a folder with checkpoints of an earlier one.
        FileNotFoundError: If the YAML file or the checkpoint to resume from does not exist.
        TypeError, ValueError: If an argument is unknown, missing, of the wrong type, or out of range.
    """
    parser = _parser(script_arguments, program, output_dir, description)
    if {"-h", "--help", "--help_all"} & set(argv):
        _print_help(parser, COMMON | {f.name for f in fields(script_arguments)}, "--help_all" in argv)
        raise SystemExit
    refuse_bare_file(argv)
    if not {"--config", "--model_name_or_path", "--model-name-or-path"} & {word.partition("=")[0] for word in argv}:
        if default_config is None or not default_config.is_file():
            raise ValueError(
                "`model_name_or_path` is missing; give a model with `--model_name_or_path` and prompts with "
                "`--dataset`, or both in a YAML file with `--config`"
            )
        argv = ["--config", os.path.relpath(default_config), *argv]
    script, args, model = parse_command_line(parser, argv)
    if not model.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing; give the model's folder or its name on the Hub")
    if args.resume_from_checkpoint:
        find_checkpoint(args.resume_from_checkpoint, args.output_dir, read=False)
    elif problem := earlier_run(args.output_dir):
        raise FileExistsError(problem)
    args.model_init_kwargs = model_init_kwargs(args, model)
    return script, args, model


def _parser(
    script_arguments: type[PromptArguments], program: str, output_dir: str, description: str | None
) -> TrlParser:
    """The parser of a training script, with defaults for this machine."""
    kinds: Any = (script_arguments, CFGDistillDiversityConfig, ModelConfig)
    parser = TrlParser(
        kinds,
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults_with_config(
        output_dir=output_dir,
        report_to="tensorboard" if find_spec("tensorboard") else "none",
        use_cpu=not torch.accelerator.is_available(),  # without it transformers refuses bfloat16 on a CPU
        bf16=has_fast_bfloat16(),
    )
    return parser


def _print_help(parser: TrlParser, shown: set[str], all_of_it: bool) -> None:
    """Print the help for the arguments in `shown`, or for all."""
    for action in parser._actions:
        if not all_of_it and action.dest not in shown:
            action.help = argparse.SUPPRESS
    parser.print_help()
    print("\nAll arguments of TRL's RLOOConfig and ModelConfig are accepted too: --help_all lists them.")


def model_init_kwargs(args: CFGDistillDiversityConfig, model: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`; safetensors only, since pickles can run code when loaded."""
    given: dict[str, Any] = {"use_safetensors": True}
    given |= {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    own: Any = args.model_init_kwargs or {}
    return given | {"dtype": model.dtype} | own


def shipped_recipe(name: str) -> Path | None:
    """A file or folder in recipes/ if the package is in a clone of its repository; else `None`."""
    path = Path(__file__).parents[2] / "recipes" / name
    return path if path.exists() else None
