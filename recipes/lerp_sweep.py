"""
What lambda does: models between a quality and a diversity model, Eq. (6) of https://huggingface.co/papers/2410.06084,
measured on held-out prompts beside the base. Both ends stay in memory and lambda is set in place, so that no folder is
written per lambda. For models of musiclm_drcd.py:

    python recipes/lerp_sweep.py --quality outputs/musiclm_quality --diversity outputs/musiclm_diversity

Writes results.md and results.jsonl; what an earlier call has measured is kept.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in recipes/musiclm_drcd.py

import argparse
import json
from pathlib import Path

import torch
from demo import COLUMNS, HERE, SEED, TEMPERATURE, measured_values
from transformers import AutoModelForCausalLM

from trl_drcd._files import write_text
from trl_drcd._run import local_name
from trl_drcd.evaluation.tables import compare
from trl_drcd.merging import hold_checkpoints, set_interpolation_weight


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", required=True, help="model at lambda 0")
    parser.add_argument("--diversity", required=True, help="model at lambda 1")
    parser.add_argument("--output", type=Path, default=Path("outputs/lerp_sweep"), help="folder of the results")
    parser.add_argument("--points", type=int, default=5, help="values of lambda from 0 to 1, at least 2")
    parser.add_argument("--world", type=Path, default=HERE / "tiny_music", help="has models/ and data/")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts to measure on")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt, at least 2")
    args = parser.parse_args(argv)
    if args.points < 2:
        parser.error(f"--points must be at least 2, got {args.points}")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measures the base and every lambda, and writes the tables."""
    args = parse(argv)
    base = AutoModelForCausalLM.from_pretrained(args.world / "models" / "musiclm", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(args.quality, dtype=torch.float32)
    hold_checkpoints(model, [args.quality, args.diversity])
    grid = [None, *(point / (args.points - 1) for point in range(args.points))]  # None is the base
    settings = {name: str(getattr(args, name)) for name in ("quality", "diversity", "prompts", "samples")}
    measured = {}
    for weight in grid:
        name = "base" if weight is None else f"lambda {weight:.2f}"
        file = args.output / "measured" / f"{name.replace(' ', '_')}.json"
        entry = json.loads(file.read_text()) if file.exists() else {}
        if entry.get("settings") != settings:
            if weight is not None:
                set_interpolation_weight(model, weight)
            samples, _, values = measured_values(base if weight is None else model, base, 1.0, args, name)
            entry = {"settings": settings, "tokens_per_second": samples.tokens_per_second, "values": values}
            write_text(file, json.dumps(entry))
        models = ["musiclm"] if weight is None else [local_name(args.quality), local_name(args.diversity)]
        about = {"model": " + ".join(models), "guidance_scale": 1.0, "interpolation_weight": weight}
        measured[name] = entry | {"about": about}
    shared = {"temperature": TEMPERATURE, "seed": SEED, "prompts": args.prompts, "samples_per_prompt": args.samples}
    about = f"{args.prompts} held-out prompts x {args.samples} samples, temperature {TEMPERATURE}, seed {SEED}; "
    _, lines, tables = compare(measured, COLUMNS, about + "mean and 95 % bootstrap interval over prompts.", shared)
    write_text(args.output / "results.jsonl", lines)
    write_text(args.output / "results.md", tables)
    print(tables)


if __name__ == "__main__":
    main()
