"""
Seconds and peak memory of an update, for models of the published sizes with random weights.

    python benchmarks/gpu/steps.py

SmolLM2-135M and a Llama of 1 B (16 prompts of 16 tokens, groups of 4, completions of 128), MusicGen small and medium
(8 sequences of 503 steps, 10 s of music), all weights and LoRA of rank 16, bfloat16 autocast on float32 weights,
gradient checkpointing, no diversity reward. Each in a process of its own, which makes two updates to warm up and three
that count. Of a MusicGen, `computed` is the peak of `benchmarks/musicgen_memory.py`. Seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.files import write_text
from trl_drcd.markdown import markdown_table
from trl_drcd.policies.musicgen import LORA_TARGETS

sys.path.insert(0, str(Path(__file__).parents[1]))
from musicgen_memory import memory, published
from rollout import tiny_musicgen

RANK, WARM_UP, TIMED, PROMPT = 16, 2, 3, 16
PARTS = ("rollout", "teacher", "reward", "update")
LLAMAS = {
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-tiny": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}  # fmt: skip
LARGE = ("smollm2-135m", "llama-1b", "musicgen-small", "musicgen-medium")
SMALL = ("llama-tiny", "musicgen-tiny")


def musicgen_config(name: str) -> MusicgenConfig:
    """Of `musicgen-NAME`."""
    size = name.removeprefix("musicgen-")
    return tiny_musicgen() if size == "tiny" else published(size)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<unk>", eos_token="</s>", unk_token="<unk>"
    )


def sizes(name: str) -> tuple[int, int]:
    """Sequences, and steps of each."""
    if name.endswith("tiny"):
        return 8, 16
    return (8, 503) if name.startswith("musicgen") else (64, 128)


def measure(name: str, lora: bool, folder: str) -> dict[str, float]:
    """Seconds of an update by its parts, and the peak of the device's memory, MiB (0 on a CPU)."""
    torch.manual_seed(0)
    batch, steps = sizes(name)
    if name.startswith("musicgen"):
        model: Any = MusicgenForConditionalGeneration(musicgen_config(name))
        # The ids at which generation begins and ends, as the published checkpoints have them
        silence = model.config.decoder.vocab_size
        model.generation_config.update(pad_token_id=silence, bos_token_id=silence, decoder_start_token_id=silence)
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMAS[name], max_position_embeddings=1024, eos_token_id=1))
    args = CFGDistillDiversityConfig(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_completion_length=steps,
        max_steps=WARM_UP + TIMED, logging_steps=1, save_strategy="no", report_to="none", bf16=True,
        gradient_checkpointing=True, disable_tqdm=True, num_generations=4, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    targets = LORA_TARGETS if name.startswith("musicgen") else "all-linear"
    trainer = CFGDistillDiversityTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(["a"] * PROMPT)] * 64}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=RANK, target_modules=targets) if lora else None,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "time/update" in entry][WARM_UP:]
    seconds = {part: statistics.median(entry[f"time/{part}"] for entry in logs) for part in PARTS}
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"seconds": sum(seconds.values()), **seconds, "sequences/s": batch / sum(seconds.values()), "peak": peak}


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit status is the number of cases that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--output", type=Path, help="JSON file of the result, written after each case")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # name, way, file
    args = parser.parse_args(argv)
    if args.one:
        name, way, file = args.one
        write_text(Path(file), json.dumps(measure(name, way == "LoRA", str(Path(file).parent))))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    failed = 0
    for name in SMALL if args.small else LARGE:
        for way in ("all weights", "LoRA"):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "found.json")
                code = subprocess.run([sys.executable, __file__, "--one", name, way, str(file)]).returncode
                found = json.loads(file.read_text()) if not code else {"seconds": "failed"}
            failed += bool(code)
            if name.startswith("musicgen"):
                rank = RANK if way == "LoRA" else None
                found["computed"] = memory(musicgen_config(name), *sizes(name), PROMPT, rank, 4)["peak"]
            rows[f"{name}, {way}"] = found
            if args.output:
                write_text(args.output, json.dumps(rows, indent=1))
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    print(markdown_table({name: {column: row.get(column, "") for column in columns} for name, row in rows.items()}))
    return failed


if __name__ == "__main__":
    sys.exit(main())
