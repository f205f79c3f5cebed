"""
Distil classifier-free guidance into a text-to-music model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

From the root of the repository and without arguments, the short run of recipes/musiclm_quality.yaml on the model that
is shipped in recipes/tiny_music; with another YAML file, and a value of it overridden:

    accelerate launch recipes/musiclm_drcd.py
    accelerate launch recipes/musiclm_drcd.py --config recipes/musiclm_diversity.yaml --max_steps 300

Any causal LM over words and audio tokens, and any prompts (hub name, or a JSONL, CSV or Parquet file, with a column
`prompt` and perhaps `negative_prompt`); then the defaults are the paper's:

    accelerate launch recipes/musiclm_drcd.py --model_name_or_path my/musiclm --codec my/codec \\
        --embedder my/embedder --dataset prompts.jsonl --diversity_coef 5 --output_dir outputs/mine

With LoRA (the teacher is then the same weights with the adapter off); after an interruption:

    accelerate launch recipes/musiclm_drcd.py --use_peft --lora_target_modules all-linear --lora_dropout 0
    accelerate launch recipes/musiclm_drcd.py --resume_from_checkpoint true

The output folder gets the model with its tokenizer and a generation config without guidance, the codec, a model card,
the log (log.jsonl; TensorBoard where it is installed) and WAV samples of fixed held-out prompts.
"""

from __future__ import annotations

import os

# One thread per process unless the caller says otherwise; measured in recipes/README.md, section Threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd._files import wav_bytes, write_bytes, write_text
from trl_drcd._run import Deadline, LogFile, distinct, final_metrics, find_checkpoint, load_prompts, local_name
from trl_drcd._run import model_card as make_card
from trl_drcd.checks import check_datasets
from trl_drcd.codecs import SpectralCodec
from trl_drcd.embedders import MusicEmbedder
from trl_drcd.evaluation.sampling import sample_prompts

# What runs where the command line names neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).with_name("musiclm_quality.yaml")
# What --help shows of the arguments of TRL and transformers; --help_all shows them all
COMMON = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_completion_length", "num_generations", "temperature", "bf16", "seed"),
    *("logging_steps", "eval_strategy", "eval_steps", "save_steps", "resume_from_checkpoint", "report_to"),
    *("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "guidance_scale"),
    *("negative_prompt", "diversity_coef", "diversity_warmup_steps", "sample_steps", "sample_prompts"),
}


@dataclass
class ScriptArguments:
    """Prompts, and what turns tokens into music and music into embeddings."""

    dataset: str | None = field(
        default=None, metadata={"help": "Prompts to train on: hub name, or JSONL, CSV or Parquet file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out prompts, likewise; evaluated and sampled from."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of a hub data set to evaluate on."})
    max_eval_prompts: int = field(default=64, metadata={"help": "Evaluate on the first so many held-out prompts."})
    codec: str | None = field(
        default=None,
        metadata={"help": "Folder of the codec; by default the folder `codec` inside the model's, if there is one."},
    )
    embedder: str | None = field(
        default=None, metadata={"help": "Folder of the music embedder E; needed where diversity_coef is above 0."}
    )
    num_samples: int = field(default=4, metadata={"help": "Held-out prompts to write samples of after training."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "End training after so many minutes, whatever max_steps says."}
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


def has_fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32; elsewhere it only emulates it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def parse(argv: list[str]) -> tuple[ScriptArguments, CFGDistillDiversityConfig, ModelConfig]:
    """Arguments: the command line before the YAML file of `--config`, that before the defaults."""
    if not {"--config", "--model_name_or_path", "--model-name-or-path"} & {word.partition("=")[0] for word in argv}:
        argv = ["--config", os.path.relpath(DEFAULT_CONFIG), *argv]
    parser = TrlParser(
        (ScriptArguments, CFGDistillDiversityConfig, ModelConfig),
        prog="accelerate launch recipes/musiclm_drcd.py",
        usage="%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    defaults = {
        "output_dir": "outputs/musiclm_drcd",
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "use_cpu": not torch.accelerator.is_available(),  # without it transformers refuses bfloat16 on a CPU
        "bf16": has_fast_bfloat16(),
    }
    parser.set_defaults_with_config(**defaults)
    if {"-h", "--help", "--help_all"} & set(argv):
        shown = COMMON | set(ScriptArguments.__dataclass_fields__)
        for action in parser._actions:
            if "--help_all" not in argv and action.dest not in shown:
                action.help = argparse.SUPPRESS
        parser.print_help()
        print("\nAlso every argument of TRL's RLOOConfig and ModelConfig: --help_all lists them.")
        raise SystemExit
    return parser.parse_args_and_config(argv)


def check_arguments(script: ScriptArguments, args: CFGDistillDiversityConfig, model: ModelConfig) -> None:
    """Finds out before anything is loaded whether the parts are there and fit together."""
    if not script.dataset:
        raise ValueError(
            "`dataset` is missing; give a hub name, or a JSONL, CSV or Parquet file with a `prompt` column"
        )
    path = Path(model.model_name_or_path or "")
    if script.codec is None and (path / "codec").is_dir():
        script.codec = str(path / "codec")
    folders = {"codec": script.codec, "embedder": script.embedder}
    if len(path.parts) > 2 or path.is_absolute() or str(model.model_name_or_path).startswith("."):
        folders["model_name_or_path"] = model.model_name_or_path  # no hub name has this form
    for name, folder in folders.items():
        if folder and not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"`{name}={folder}` has no config.json; give the folder of a saved one")
    if script.embedder and not script.codec:
        raise ValueError(f"`embedder={script.embedder}` hears audio, and there is no `codec` to make it")
    if args.diversity_coef > 0 and not script.embedder:
        raise ValueError(f"`diversity_coef={args.diversity_coef}` needs `embedder`, got None")
    if args.eval_strategy != "no" and not script.eval_dataset:
        raise ValueError(f"`eval_strategy={args.eval_strategy.value}` needs `eval_dataset`, got None")
    if args.resume_from_checkpoint:
        args.resume_from_checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)


def write_samples(trainer: CFGDistillDiversityTrainer, codec: Any, count: int) -> None:
    """One completion, without guidance, of each of the first held-out prompts, as WAV files or text."""
    args, folder = trainer.args, Path(trainer.args.output_dir) / "samples"
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    samples = sample_prompts(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        distinct(dataset["prompt"], count),
        temperature=args.temperature,
        max_new_tokens=args.max_completion_length,
        seed=args.seed,
        description="samples",
    )
    shutil.rmtree(folder, ignore_errors=True)
    rows = [{"prompt": prompt} for prompt in samples.prompts]
    if codec is None:
        for row, ids in zip(rows, samples.token_ids, strict=True):
            row["completion"] = trainer.processing_class.decode(ids, skip_special_tokens=True)
    else:
        for number, (waveform, rate) in enumerate(codec.decode(samples.token_ids)):
            rows[number]["file"] = f"{number:02d}.wav"
            write_bytes(folder / f"{number:02d}.wav", wav_bytes(waveform, rate))
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def save(
    trainer: CFGDistillDiversityTrainer, script: ScriptArguments, model: ModelConfig, codec: Any, metrics: dict
) -> None:
    """Everything that the output folder holds besides checkpoints and the log."""
    args, output = trainer.args, Path(trainer.args.output_dir)
    trainer.save_model(str(output))
    if not trainer.accelerator.is_main_process:
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; the model card says what matters of it
    trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(output)
    if script.codec:
        shutil.copytree(script.codec, output / "codec", dirs_exist_ok=True)
    write_samples(trainer, codec, script.num_samples)
    names = ("guidance_scale", "negative_prompt", "temperature", "diversity_coef", "diversity_warmup_steps")
    names += ("num_generations", "learning_rate", "max_completion_length", "bf16", "seed")
    settings = {
        "prompts": local_name(str(script.dataset)),
        "steps": trainer.state.global_step,
        "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "LoRA rank": model.lora_r if model.use_peft else None,
    } | {name: getattr(args, name) for name in names}
    card = make_card(
        output.name, str(model.model_name_or_path), settings, metrics, codec is not None, bool(model.use_peft)
    )
    write_text(output / "README.md", str(card))


def main(argv: list[str] | None = None) -> None:
    """Checks, trains, saves."""
    try:
        script, args, model = parse(sys.argv[1:] if argv is None else argv)
        check_arguments(script, args, model)
        train, held_out = load_prompts("dataset", str(script.dataset), script.dataset_split), None
        if script.eval_dataset:
            held_out = load_prompts("eval_dataset", script.eval_dataset, script.eval_split)
            held_out = held_out.select(range(min(script.max_eval_prompts, len(held_out))))
        check_datasets(train, held_out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"musiclm_drcd.py: error: {error}") from error

    model_init = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    args.model_init_kwargs = model_init | {"dtype": model.dtype} | (args.model_init_kwargs or {})
    codec = SpectralCodec.from_pretrained(script.codec) if script.codec else None
    trainer = CFGDistillDiversityTrainer(
        model=str(model.model_name_or_path),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        embedder=MusicEmbedder.from_pretrained(script.embedder) if script.embedder else None,
        codec=codec,
        callbacks=[LogFile(), *([Deadline(script.max_minutes)] if script.max_minutes else [])],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluates = args.eval_strategy != "no"
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_kl" in entry]
    if evaluates and trainer.state.global_step not in evaluated[-1:]:
        trainer.evaluate()
    metrics = final_metrics(trainer.state.log_history, evaluates)
    save(trainer, script, model, codec, metrics)
    if trainer.accelerator.is_main_process:
        for which, row in metrics.items():
            print(f"  {which:18s}" + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        print(f"Model, model card, log and samples are in {args.output_dir}")


if __name__ == "__main__":
    main()
