"""
Distil classifier-free guidance into a text-to-music model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

Works with any causal LM over words and audio tokens, and any prompts (Hub name, or a JSONL, CSV or Parquet file, with
a column `prompt` and optionally `negative_prompt`); the defaults are the paper's:

    trl-drcd train music --model_name_or_path my/musiclm --codec my/codec --embedder my/embedder \\
        --dataset prompts.jsonl --diversity_coef 10 --diversity_warmup_steps 0.3 --output_dir outputs/mine

MusicGen has its own codec, and its completion length is in decoder steps (50 per second, plus 3 for the delays):

    trl-drcd train music --model_name_or_path facebook/musicgen-small --dataset prompts.jsonl \\
        --max_completion_length 503 --output_dir outputs/musicgen

From a YAML file, with one value overridden; with LoRA (the teacher is then the same weights with the adapter off);
with a reward of your own, a function in rewards.py; resumed after an interruption:

    trl-drcd train music --config run.yaml --max_steps 300
    trl-drcd train music --config run.yaml --use_peft --lora_target_modules all-linear --lora_dropout 0
    trl-drcd train music --config run.yaml --reward_funcs rewards.loudness --reward_weights 0.5
    trl-drcd train music --config run.yaml --resume_from_checkpoint auto

On several GPUs: `accelerate launch --config_file FILE -m trl_drcd.scripts.train_music`, with the same arguments.

The output folder gets the model with its tokenizer and a generation config without guidance, the codec, a model card,
the log (log.jsonl; TensorBoard where it is installed) and WAV samples of fixed held-out prompts.
"""

from __future__ import annotations

import os

# Threads that wait for others sleep soon: a spinning one keeps other processes waiting. torch reads this when imported
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl_drcd.audio import MusicEmbedder, SpectralCodec
from trl_drcd.launch.arguments import PromptArguments, parse_training_arguments, shipped_recipe
from trl_drcd.launch.parts import load_datasets, load_embedder, load_part
from trl_drcd.launch.processes import end_on_signals
from trl_drcd.launch.training import NO_FAULT_OF_CODE, make_trainer, train_and_save
from trl_drcd.validation.messages import one_line_errors


@dataclass
class MusicArguments(PromptArguments):
    """Arguments of [`PromptArguments`], and the codec."""

    codec: str | None = field(
        default=None,
        metadata={"help": "Folder of the codec; by default the folder `codec` inside the model's, if there is one."},
    )


def main(
    argv: Sequence[str] | None = None,
    default_config: Path | None = None,
    program: str = "trl-drcd train music",
    description: str | None = __doc__,
) -> None:
    """
    Validate the arguments, train, and save.

    Args:
        argv (`Sequence[str]`, *optional*): The command line; that of the process if `None`.
        default_config (`Path`, *optional*): YAML file to use if the command line has neither one nor a model.
        program (`str`, *optional*): Name of the script in messages.
        description (`str`, *optional*): Description in `--help`.
    """
    words = sys.argv[1:] if argv is None else argv
    with end_on_signals(program):
        with one_line_errors(program):
            script, args, model = parse_training_arguments(
                words, MusicArguments, program, "outputs/musiclm_drcd", description, default_config
            )
            inside = Path(str(model.model_name_or_path), "codec")
            folder = script.codec or (str(inside) if inside.is_dir() else None)
            train, held_out = load_datasets(script)
            embedder = load_embedder(MusicEmbedder.from_pretrained, script.embedder)
            codec = load_part("codec", SpectralCodec.from_pretrained, folder)
            trainer = make_trainer(script, args, model, train, held_out, embedder=embedder, codec=codec)
        with one_line_errors(program, NO_FAULT_OF_CODE):
            train_and_save(trainer, script)


if __name__ == "__main__":
    main(default_config=shipped_recipe("music/musiclm_quality.yaml"))
