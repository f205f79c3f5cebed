"""
Plot training runs beside each other: KL to the guided teacher, diversity and entropy against the step.

    python recipes/plot_runs.py outputs/long/quality outputs/long/diversity --output results/music/long_run/curves.png

Each folder holds the `log.jsonl` that recipes/musiclm_drcd.py writes. Lines are training batches, dots the held-out
prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {
    "kl": "KL to the guided teacher\n(nats per sequence)",
    "diversity": "diversity within a prompt\n(1 - cosine)",
    "entropy": "entropy\n(nats per token)",
}
# Okabe and Ito's palette, legible with every kind of colour vision; without its black and yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]


def draw(runs: dict[str, list[dict]]) -> Figure:
    """One panel for each quantity, one colour for each run."""
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for colour, (name, log) in zip(COLOURS, runs.items(), strict=False):
            for prefix, style in (("", {"lw": 1.4, "label": name}), ("eval_", {"ls": "", "marker": "o", "ms": 5})):
                points = [(entry["step"], entry[prefix + key]) for entry in log if prefix + key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, **style)
        axes.set(xlabel="step", title=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, title="dots: held-out prompts", title_fontsize="small", fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of training runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/curves.png"), help="PNG or SVG file")
    args = parser.parse_args()
    if missing := [str(run) for run in args.runs if not (run / "log.jsonl").is_file()]:
        parser.error(f"no log.jsonl in {', '.join(missing)}")
    if len(args.runs) > len(COLOURS):
        parser.error(f"{len(args.runs)} runs; at most {len(COLOURS)} can be told apart")
    runs = {run.name: [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in args.runs}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
