"""
Distil classifier-free guidance into a language model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

From the root of the repository, after `python recipes/text/get_smollm2.py` and without arguments, the short run of
recipes/text/text_smollm2.yaml: LoRA on SmolLM2-135M-Instruct and the creative-writing prompts of recipes/text/prompts.
With another YAML file, and a value of it overridden:

    accelerate launch recipes/text_drcd.py
    accelerate launch recipes/text_drcd.py --config recipes/text/text_smollm2_diversity.yaml --max_steps 300

Any causal LM and any prompts (hub name, or a JSONL, CSV or Parquet file); then the defaults are the paper's:

    accelerate launch recipes/text_drcd.py --model_name_or_path Qwen/Qwen3-0.6B --dataset prompts.jsonl \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --diversity_coef 5 --output_dir outputs/mine

A `prompt` that is a list of turns goes through the model's chat template; a text is continued as it is. The negative
prompt of the teacher is a row's `negative_prompt`, else --negative_prompt: a text (of a conversation, the user's turn)
or, in a row, a list of turns. Without one it is an empty user's turn, without the row's system prompt; for a text, the
tokenizer's rendering of "", or the BOS token where that is empty. No prompt is ever cut.

The output folder gets the model or the adapter with its tokenizer and a generation config without guidance, a model
card, the log (log.jsonl; TensorBoard where it is installed) and completions of held-out prompts.
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
from trl_drcd.callbacks import Deadline, LogFile
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.files import write_text
from trl_drcd.launch.training import (
    PromptArguments,
    check_arguments,
    load_datasets,
    load_part,
    model_init_kwargs,
    parse_arguments,
    train_and_save,
)
from trl_drcd.text import SentenceEmbedder
from trl_drcd.validation.messages import one_line_errors
from trl_drcd.validation.training import check_datasets

# What runs where the command line names neither a YAML file nor a model
DEFAULT_CONFIG = Path(__file__).with_name("text") / "text_smollm2.yaml"


@dataclass
class ScriptArguments(PromptArguments):
    """Prompts, and what embeds completions."""

    embedder: str | None = field(
        default=None,
        metadata={"help": "Sentence encoder E, folder or hub name; needed where diversity_coef is above 0."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn before every prompt that has none; texts become conversations."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training prompts as they are needed; max_steps must be set."}
    )


def with_system_prompt(row: dict[str, Any], system_prompt: str) -> dict[str, Any]:
    """The row with a system turn before its prompt, unless it has one."""
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    return {"prompt": turns}


def write_samples(samples: Samples, folder: Path, tokenizer: Any) -> None:
    """`samples.jsonl`: prompts with their completions."""
    texts = tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True)
    rows = zip(samples.repeated_prompts, texts, strict=True)
    lines = (json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows)
    write_text(folder / "samples.jsonl", "".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Checks, trains, saves."""
    with one_line_errors("text_drcd.py"):
        script, args, model = parse_arguments(
            sys.argv[1:] if argv is None else argv,
            ScriptArguments,
            CFGDistillDiversityConfig,
            "text_drcd",
            __doc__,
            DEFAULT_CONFIG,
        )
        if model.model_name_or_path == "outputs/smollm2" and not Path(model.model_name_or_path).is_dir():
            raise FileNotFoundError("the default model is not there yet. Run: python recipes/text/get_smollm2.py")
        check_arguments(script, args, model, {})
        if script.streaming and args.max_steps <= 0:
            raise ValueError(f"`streaming=True` has no end by itself: set `max_steps`, got {args.max_steps}")
        datasets = load_datasets(script, script.streaming)
        if script.system_prompt:
            settings = {"fn_kwargs": {"system_prompt": script.system_prompt}}
            datasets = tuple(data if data is None else data.map(with_system_prompt, **settings) for data in datasets)
        check_datasets(*datasets)
        args.model_init_kwargs = model_init_kwargs(args, model)
        trainer = CFGDistillDiversityTrainer(
            model=str(model.model_name_or_path),
            args=args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            embedder=load_part("embedder", SentenceEmbedder, script.embedder),
            callbacks=[LogFile(), *([Deadline(script.max_minutes)] if script.max_minutes else [])],
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )

    def write(samples: Samples, folder: Path) -> None:
        write_samples(samples, folder, trainer.processing_class)

    train_and_save(trainer, script, model, sample_prompts, write)


if __name__ == "__main__":
    main()
