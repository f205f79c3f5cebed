"""
Cost of the critic of prefixes: processor seconds of its part of an update, against the rest of the same update.

The critic's part is decoding and embedding the prefixes; its arithmetic takes milliseconds. Music: the shipped
model with all weights, 32 completions of 200 codes; `music, each decoded` decodes every prefix separately, as for a
codec without `draft`. Text: SmolLM2 with LoRA and all-MiniLM-L6-v2, as in recipes/text/text_smollm2_diversity.yaml.

    python recipes/text/get_smollm2.py
    OMP_NUM_THREADS=1 python benchmarks/critic_cost.py --output benchmarks/results/critic_cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback

from trl_drcd.audio import MusicEmbedder, SpectralCodec
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.launch.arguments import PromptArguments, parse_training_arguments
from trl_drcd.launch.parts import load_datasets
from trl_drcd.launch.training import make_trainer
from trl_drcd.scripts.train_music import MusicArguments
from trl_drcd.text import SentenceEmbedder

ROOT = Path(__file__).parents[1]
WAYS = ("music", "music, each decoded", "text")
SAME = {"eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "report_to": "none"}
SAME |= {"logging_steps": "1000", "diversity_credit": "critic", "bf16": "false", "dtype": "float32"}


class WithoutDraft:
    """A codec that decodes each prefix separately."""

    def __init__(self, codec: Any):
        self.decode = codec.decode


class Watch(TrainerCallback):
    """Processor seconds of updates, and of the prefixes within them."""

    def __init__(self, term: Any):
        self.updates: list[float] = []
        self.prefixes: list[float] = []
        inner = term._prefixes

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            result = inner(*arguments)
            self.prefixes.append(time.process_time() - start)
            return result

        term._prefixes = timed

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.updates.append(time.process_time() - self.start)


def measure(way: str, prefixes: int, steps: int) -> dict[str, float]:
    """Medians over updates, after one to warm up."""
    text = way == "text"
    recipe = ROOT / "recipes" / ("text/text_smollm2_diversity.yaml" if text else "music/musiclm_diversity.yaml")
    with tempfile.TemporaryDirectory() as folder:
        settings = SAME | {"max_steps": steps + 1, "diversity_prefixes": prefixes, "output_dir": folder}
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        kind: type[PromptArguments] = PromptArguments if text else MusicArguments
        script, args, model = parse_training_arguments(["--config", str(recipe), *words], kind, "critic_cost", folder)
        parts: dict[str, Any] = {"embedder": SentenceEmbedder(str(script.embedder))} if text else {
            "embedder": MusicEmbedder.from_pretrained(str(script.embedder)),
            "codec": SpectralCodec.from_pretrained(script.codec),
        }  # fmt: skip
        if way.endswith("each decoded"):
            parts["codec"] = WithoutDraft(parts["codec"])
        trainer = make_trainer(script, args, model, *load_datasets(script), **parts)
        watch = Watch(trainer._diversity)
        trainer.add_callback(watch)
        trainer.train()
    critic, update = median(watch.prefixes[1:]), median(watch.updates[1:])
    return {"update": update, "critic": critic, "critic / rest": critic / (update - critic)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--prefixes", type=int, default=9, help="`diversity_prefixes`")
    parser.add_argument("--steps", type=int, default=3, help="updates, after one to warm up")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_freed_memory()
    os.chdir(ROOT)
    rows = {way: measure(way, args.prefixes, args.steps) for way in args.ways}
    print(markdown_table(rows))
    if args.output:
        about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        about |= {"prefixes": args.prefixes, "updates": args.steps, "rows": rows}
        write_text(args.output, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
