"""
Distil classifier-free guidance into a language model, with or without the diversity reward
(https://huggingface.co/papers/2410.06084).

Works with any causal LM and any prompts (Hub name, or a JSONL, CSV or Parquet file); the defaults are the paper's:

    trl-drcd train text --model_name_or_path Qwen/Qwen3-0.6B --dataset prompts.jsonl \\
        --embedder sentence-transformers/all-MiniLM-L6-v2 --diversity_coef 10 --diversity_warmup_steps 0.3 \\
        --output_dir outputs/mine

From a YAML file, with one value overridden; with LoRA (the teacher is then the same weights with the adapter off);
with a reward of your own, a function in rewards.py; resumed after an interruption:

    trl-drcd train text --config run.yaml --max_steps 300
    trl-drcd train text --config run.yaml --use_peft --lora_target_modules all-linear --lora_dropout 0
    trl-drcd train text --config run.yaml --reward_funcs rewards.rhymes --reward_weights 0.5
    trl-drcd train text --config run.yaml --resume_from_checkpoint auto

On several GPUs: `accelerate launch --config_file FILE -m trl_drcd.scripts.train_text`, with the same arguments.

A `prompt` that is a list of turns is rendered with the model's chat template; a string is continued as it is. Data
sets of chats (`messages`), ShareGPT (`conversations`) and Alpaca (`instruction`) are converted to turns. The negative
prompt of the teacher is a row's `negative_prompt`, else --negative_prompt: a string (for a conversation, the user
turn) or, in a row, a list of turns. The default for conversations is an empty user turn without the row's system
prompt; for strings, the tokenizer's encoding of "", or the BOS token if that is empty. Prompts are never truncated.

The output folder gets the model or the adapter with its tokenizer and a generation config without guidance, a model
card, the log (log.jsonl; TensorBoard where it is installed) and completions of held-out prompts.
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

from trl_drcd.launch.arguments import PromptArguments, parse_training_arguments, shipped_recipe
from trl_drcd.launch.parts import load_datasets, load_embedder
from trl_drcd.launch.processes import end_on_signals
from trl_drcd.launch.training import NO_FAULT_OF_CODE, make_trainer, train_and_save
from trl_drcd.text import SentenceEmbedder
from trl_drcd.validation.messages import one_line_errors

# The model of the shipped YAML files, which recipes/text/get_smollm2.py makes
MADE_HERE = "outputs/smollm2"


@dataclass
class TextArguments(PromptArguments):
    """Arguments of [`PromptArguments`], and how prompts are read."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn for every prompt that has none; strings become conversations."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream training prompts instead of loading them; max_steps must be set."}
    )


def main(
    argv: Sequence[str] | None = None,
    default_config: Path | None = None,
    program: str = "trl-drcd train text",
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
                words, TextArguments, program, "outputs/text_drcd", description, default_config
            )
            if model.model_name_or_path == MADE_HERE and not Path(MADE_HERE).is_dir() and shipped_recipe("text"):
                raise FileNotFoundError(f"`{MADE_HERE}` does not exist yet. Run: python recipes/text/get_smollm2.py")
            train, held_out = load_datasets(script, script.streaming, script.system_prompt)
            embedder = load_embedder(SentenceEmbedder, script.embedder)
            trainer = make_trainer(script, args, model, train, held_out, embedder=embedder)
        with one_line_errors(program, NO_FAULT_OF_CODE):
            train_and_save(trainer, script)


if __name__ == "__main__":
    main(default_config=shipped_recipe("text/text_smollm2.yaml"))
