"""
Speed as served: tokens per second of rows of an evaluation, sampled in turn, each model with its adapters merged into
its weights.

    python benchmarks/served.py                                     # the shipped music model; base, guided, merged
    python benchmarks/served.py --config recipes/text/evaluate_study.yaml \\
        --rows base "CFG (gamma 3)" "LERP (lambda 0.5) #0"

The rows share prompts and number of samples; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from tqdm import tqdm
from training_step import machine
from transformers import AutoTokenizer

from trl_drcd.evaluation.allowed import allowed_in_rows, suppressed_in
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.measuring import sample_row
from trl_drcd.evaluation.models import Models
from trl_drcd.evaluation.plan import held_out_prompts
from trl_drcd.evaluation.strategies import Row, expand
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.validation.messages import one_line_errors
from trl_drcd.validation.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {
    "model": ROOT / "recipes/tiny_music/models/musiclm",
    "dataset": ROOT / "recipes/tiny_music/data/fresh_prompts.jsonl",
    "strategies": [
        {"name": "base"},
        {"name": "CFG", "guidance_scale": 3},
        {
            "name": "LERP",
            "models": [str(ROOT / "results/music/study" / end) for end in ("quality", "rewarded")],
            "interpolation_weight": 0.5,
        },
    ],
}


def seconds(rows: list[Row], args: EvaluateArguments, rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Wall clock, processor time, and tokens of each row in each round but the first."""
    held_out = held_out_prompts(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    models: dict[str, Any] = {}
    for row in rows:
        model = Models(args.model, getattr(torch, args.dtype))(row)
        allowed = allowed_in_rows(args.allowed_token_ids, suppressed_in(args), model, tokenizer)
        models[row.name] = model.merge_and_unload() if isinstance(model, PeftModel) else model
    found: dict[str, list[tuple[float, float, int]]] = {row.name: [] for row in rows}
    for number in tqdm(range(rounds + 1), unit="round"):
        for row in rows:
            began, processor = time.perf_counter(), time.process_time()
            samples = sample_row(row, models[row.name], tokenizer, args, held_out, allowed)
            if number:
                wall, used = time.perf_counter() - began, time.process_time() - processor
                found[row.name].append((wall, used, sum(map(len, samples.token_ids))))
    return found


def table(found: dict[str, list[tuple[float, float, int]]], guided: str) -> dict[str, dict[str, str]]:
    """Medians over the rounds, and ratios to the guided row of the same round."""
    cells = {}
    for name, rounds in found.items():
        times = [(wall / tokens, used / tokens) for wall, used, tokens in rounds]
        theirs = [(wall / tokens, used / tokens) for wall, used, tokens in found[guided]]
        ratios = [[other[i] / own[i] for own, other in zip(times, theirs, strict=True)] for i in range(2)]
        cells[name] = {
            "tokens/s": f"{1 / statistics.median(wall for wall, _ in times):.0f}",
            "tokens per processor second": f"{1 / statistics.median(used for _, used in times):.0f}",
            "tokens/s / guided": f"{statistics.median(ratios[0]):.2f}",
            "per processor second / guided": f"{statistics.median(ratios[1]):.2f}",
        }
    return cells


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of an evaluation; by default the shipped music model")
    parser.add_argument("--rows", nargs="+", default=["base", "CFG (gamma 3)", "LERP (lambda 0.5)"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument(
        "--samples", type=int, default=8, help="samples of a prompt, all in one batch with the others'"
    )
    parser.add_argument("--tokens", type=int, help="tokens of a sample; by default those of the evaluation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    with one_line_errors("served.py"):
        settings = read_yaml(given.config) if given.config else dict(SHIPPED)
        settings |= {"num_prompts": given.prompts, "samples_per_prompt": given.samples}
        settings |= {"batch_size": given.prompts * given.samples}
        settings |= {"max_new_tokens": given.tokens} if given.tokens else {}
        known = EvaluateArguments.__dataclass_fields__
        args = EvaluateArguments(
            **{key: str(v) if isinstance(v, Path) else v for key, v in settings.items() if key in known}
        )
        rows = {row.name: row for row in expand(args.strategies)}
        if unknown := sorted(set(given.rows) - set(rows)):
            raise ValueError(
                f"--rows: {unknown} are not in {given.config or 'the shipped rows'}, which has {list(rows)}"
            )
        asked = [rows[name] for name in given.rows]
        guided = next((row.name for row in asked if row.guidance_scale != 1), None)
        if guided is None:
            raise ValueError(f"--rows needs a row with guidance to compare with, got {given.rows}")
    found = seconds(asked, args, given.rounds)
    print(markdown_table(table(found, guided)))
    if given.output:
        about = {"sequences": args.batch_size, "machine": machine(), "rounds": found}
        write_text(given.output, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
