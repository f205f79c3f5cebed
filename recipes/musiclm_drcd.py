"""
Distil classifier-free guidance into a text-to-music model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

From the root of the repository and without arguments, the short run of recipes/music/musiclm_quality.yaml on the model
that is shipped in recipes/tiny_music; with another YAML file, and a value of it overridden:

    accelerate launch recipes/musiclm_drcd.py
    accelerate launch recipes/musiclm_drcd.py --config recipes/music/musiclm_diversity.yaml --max_steps 300

Any causal LM over words and audio tokens, and any prompts (hub name, or a JSONL, CSV or Parquet file, with a column
`prompt` and perhaps `negative_prompt`); then the defaults are the paper's:

    accelerate launch recipes/musiclm_drcd.py --model_name_or_path my/musiclm --codec my/codec \\
        --embedder my/embedder --dataset prompts.jsonl --diversity_coef 5 --output_dir outputs/mine

A MusicGen has its own codec, and its completions count decoder steps (50 a second, and 3 for the delays):

    accelerate launch recipes/musiclm_drcd.py --model_name_or_path facebook/musicgen-small \\
        --dataset prompts.jsonl --max_completion_length 503 --output_dir outputs/musicgen

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

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import get_peft_config, get_quantization_config

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.callbacks import Deadline, LogFile
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.files import wav_bytes, write_bytes, write_text
from trl_drcd.launch.training import (
    PromptArguments,
    check_arguments,
    load_datasets,
    load_part,
    model_init_kwargs,
    parse_arguments,
    train_and_save,
)
from trl_drcd.policies import policy_class
from trl_drcd.validation.messages import one_line_errors
from trl_drcd.validation.training import check_datasets

# What runs where the command line names neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).with_name("music") / "musiclm_quality.yaml"


@dataclass
class ScriptArguments(PromptArguments):
    """Prompts, and what turns tokens into music and music into embeddings."""

    codec: str | None = field(
        default=None,
        metadata={"help": "Folder of the codec; by default the folder `codec` inside the model's, if there is one."},
    )
    embedder: str | None = field(
        default=None, metadata={"help": "Folder of the music embedder E; needed where diversity_coef is above 0."}
    )


def write_samples(samples: Samples, folder: Path, codec: Any, tokenizer: Any) -> None:
    """The completions as WAV files or text, and `samples.jsonl`, which says of which prompt."""
    rows = [{"prompt": prompt} for prompt in samples.prompts]
    if codec is None:
        for row, ids in zip(rows, samples.token_ids, strict=True):
            row["completion"] = tokenizer.decode(ids, skip_special_tokens=True)
    else:
        for number, (waveform, rate) in enumerate(codec.decode(samples.token_ids)):
            rows[number]["file"] = f"{number:02d}.wav"
            write_bytes(folder / f"{number:02d}.wav", wav_bytes(waveform, rate))
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    """Checks, trains, saves."""
    with one_line_errors("musiclm_drcd.py"):
        script, args, model = parse_arguments(
            sys.argv[1:] if argv is None else argv,
            ScriptArguments,
            CFGDistillDiversityConfig,
            "musiclm_drcd",
            __doc__,
            DEFAULT_CONFIG,
        )
        if script.codec is None and (inside := Path(model.model_name_or_path or "", "codec")).is_dir():
            script.codec = str(inside)
        check_arguments(script, args, model, {"codec": script.codec, "embedder": script.embedder})
        family = policy_class(str(model.model_name_or_path), model.model_revision)
        if script.embedder and not script.codec and not family.has_own_codec:
            raise ValueError(f"`embedder={script.embedder}` hears audio, and there is no `codec` to make it; give one")
        train, held_out = load_datasets(script)
        check_datasets(train, held_out)
        args.model_init_kwargs = model_init_kwargs(args, model)
        trainer = CFGDistillDiversityTrainer(
            model=str(model.model_name_or_path),
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            embedder=load_part("embedder", MusicEmbedder.from_pretrained, script.embedder),
            codec=load_part("codec", SpectralCodec.from_pretrained, script.codec),
            callbacks=[LogFile(), *([Deadline(script.max_minutes)] if script.max_minutes else [])],
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )

    def write(samples: Samples, folder: Path) -> None:
        write_samples(samples, folder, trainer.codec, trainer.processing_class)

    train_and_save(trainer, script, model, sample_prompts, write, script.codec)


if __name__ == "__main__":
    main()
