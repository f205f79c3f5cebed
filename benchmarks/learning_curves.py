"""
Effect of the credit assignment of the diversity term: short runs of the shipped music model that differ only in it.

All weights, coefficient 100, 32 sequences per step, as in recipes/music/musiclm_diversity.yaml but with a constant
learning rate; evaluated before and after on held-out prompts:

- `diversity` under the rewarded embedder, `diversity_second` under descriptors that are not rewarded;
- `adherence`, the cosine similarity of text and audio under the judge;
- `kl` to the guided teacher on the model's own samples, nats per completion;
- `processor`, median processor seconds of an update, without the measurement of gradient norms.

An interrupted run continues from its checkpoint, and a run that is in the results is not repeated, so the command
can be run again until all runs are finished.

    OMP_NUM_THREADS=1 nice python benchmarks/learning_curves.py --seeds 0 1 --runs sequence critic_0.5
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_drcd.audio import MusicDescriptors, MusicEmbedder, SpectralCodec, TextAudioJudge
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.diversity import group_diversity
from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.launch.arguments import parse_training_arguments
from trl_drcd.launch.parts import load_datasets
from trl_drcd.launch.training import make_trainer
from trl_drcd.prompts import distinct, read_prompts
from trl_drcd.scripts.train_music import MusicArguments

ROOT = Path(__file__).parents[1]
WORLD = ROOT / "recipes/tiny_music"
RUNS: dict[str, dict[str, Any]] = {  # what differs from the recipe
    "sequence": {"diversity_credit": "sequence"},
    "critic_0.5": {"diversity_credit": "critic", "gae_lambda": 0.5, "max_grad_norm_diversity": 1.0},
    "critic_0.95": {"diversity_credit": "critic", "gae_lambda": 0.95, "max_grad_norm_diversity": 1.0},
    "critic_0.5_sum": {"diversity_credit": "critic", "gae_lambda": 0.5},
    "critic_0.7": {"diversity_credit": "critic", "gae_lambda": 0.7, "max_grad_norm_diversity": 1.0},
    "critic_0.5_apart4": {"diversity_credit": "critic", "gae_lambda": 0.5, "max_grad_norm_diversity": 4.0},
    "critic_39_coef300": {
        "diversity_credit": "critic",
        "diversity_prefixes": 39,
        "gae_lambda": 0.7,
        "diversity_coef": 300,
    },
    "long": {
        "diversity_credit": "critic",
        "diversity_prefixes": 39,
        "gae_lambda": 0.7,
        "diversity_coef": 40,
        "lr_scheduler_type": "cosine",
    },
    "sequence_apart": {"diversity_credit": "sequence", "max_grad_norm_diversity": 1.0},
}
SAME = {
    "diversity_coef": 100,
    "diversity_warmup_steps": 20,
    "diversity_prefixes": 9,
    "gae_lambda": 0.95,
    "diversity_hidden_states": False,
    "lr_scheduler_type": "constant",
    "bf16": "false",
    "eval_strategy": "no",
    "eval_on_start": "false",
    "logging_steps": 10,
    "save_steps": 10,
    "save_total_limit": 1,
    "report_to": "none",
}


class ProcessorTime(TrainerCallback):
    """Appends the processor seconds of each update to a file, from its rollout to its optimizer step."""

    def __init__(self, file: Path):
        self.file, self.start = file, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.process_time() - self.start
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": state.global_step, "processor": seconds}) + "\n")


def train(name: str, seed: int, steps: int, folder: Path) -> tuple[Any, float, list[dict[str, Any]]]:
    """Trains to the end, from the newest checkpoint where there is one; model, seconds of an update, log."""
    settings = SAME | RUNS[name] | {"seed": seed, "max_steps": steps, "output_dir": folder}
    settings["resume_from_checkpoint"] = "auto"
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    recipe = str(ROOT / "recipes/music/musiclm_diversity.yaml")
    script, args, model = parse_training_arguments(
        ["--config", recipe, *words], MusicArguments, "learning_curves.py", str(folder)
    )
    parts = {
        "embedder": MusicEmbedder.from_pretrained(script.embedder),
        "codec": SpectralCodec.from_pretrained(script.codec),
    }
    trainer = make_trainer(script, args, model, *load_datasets(script), **parts)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.add_callback(ProcessorTime(folder / "processor.jsonl"))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    lines = [json.loads(line) for line in (folder / "processor.jsonl").read_text().splitlines()]
    seconds = median(line["processor"] for line in lines if line["step"] % int(SAME["logging_steps"]))
    log = [entry for entry in trainer.state.log_history if "kl" in entry]
    return trainer.model, seconds, log


@torch.no_grad()
def evaluate(model: Any, prompts: list[str], per_prompt: int) -> dict[str, Any]:
    """Means over held-out prompts, and the mean of each prompt."""
    base = AutoModelForCausalLM.from_pretrained(WORLD / "models/musiclm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "models/musiclm")
    samples = sample_prompts(model, tokenizer, prompts, per_prompt, description="samples")
    sounds = SpectralCodec.from_pretrained(WORLD / "models/codec").decode(samples.token_ids)
    judge = TextAudioJudge.from_pretrained(WORLD / "models/judge")
    rows = {
        "diversity": group_diversity(MusicEmbedder.from_pretrained(WORLD / "models/embedder")(sounds), per_prompt),
        "diversity_second": group_diversity(
            torch.as_tensor(MusicDescriptors.from_pretrained(WORLD / "models/descriptors")(sounds)), per_prompt
        ),
        "adherence": torch.as_tensor(judge.adherence(samples.repeated_prompts, sounds)),
        "kl": teacher_terms(model, base, tokenizer, samples, description="KL").kl,
    }
    by_prompt = {key: values.double().view(-1, per_prompt).mean(1) for key, values in rows.items()}
    result: dict[str, Any] = {key: float(values.mean()) for key, values in by_prompt.items()}
    return result | {"per_prompt": {key: [round(v, 5) for v in values.tolist()] for key, values in by_prompt.items()}}


def record(file: Path, row: dict[str, Any]) -> None:
    """Adds a row to the results; each run is one JSON object in a list."""
    rows = json.loads(file.read_text()) if file.is_file() else []
    write_text(file, "[\n" + ",\n".join(json.dumps(r) for r in [*rows, row]) + "\n]\n")


def table(file: Path) -> str:
    """The results as a markdown table."""
    columns = ("step", "diversity", "diversity_second", "adherence", "kl", "processor")
    rows = json.loads(file.read_text())
    names = [f"{row['run']}, seed {row['seed']}" if row["step"] else row["run"] for row in rows]
    return markdown_table({n: {c: row[c] for c in columns if c in row} for n, row in zip(names, rows, strict=True)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="in this order")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="each with all runs, one after the other")
    parser.add_argument("--steps", type=int, default=60, help="updates")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=8, help="completions of each")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/learning_curves", help="of checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "results/gradient/music_learning_curves.json")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_freed_memory()
    os.chdir(ROOT)  # the recipe's paths are relative to it
    texts = (row["prompt"] for row in read_prompts("dataset", str(WORLD / "data/test_prompts.jsonl"), "train"))
    prompts = distinct(texts, args.prompts)
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    done = {(row["run"], row["seed"], row["step"]) for row in rows}
    if ("base", 0, 0) not in done:
        base = AutoModelForCausalLM.from_pretrained(WORLD / "models/musiclm", dtype=torch.float32)
        record(args.output, {"run": "base", "seed": 0, "step": 0} | evaluate(base, prompts, args.samples))
    for seed in args.seeds:
        for name in args.runs:
            if (name, seed, args.steps) in done:
                continue
            model, seconds, log = train(name, seed, args.steps, args.folder / f"{name}_s{seed}")
            row = {"run": name, "seed": seed, "step": args.steps, "settings": RUNS[name], "processor": seconds}
            record(args.output, row | evaluate(model, prompts, args.samples) | {"log": log})
            del model
            gc.collect()
            print(table(args.output), flush=True)
    print(table(args.output))


if __name__ == "__main__":
    main()
