"""
Plot training runs for comparison: KL to the guided teacher, diversity and entropy against the step; with `--judged`
also text adherence, which is not measured in training.

    python recipes/plot_runs.py outputs/runs/beta0_s0 outputs/runs/beta300_s0
    python recipes/plot_runs.py outputs/runs/beta0_s0 outputs/runs/beta300_s0 \\
        --judged outputs/evaluation_training/results.jsonl
    python recipes/plot_runs.py results/text/beta200_s?.jsonl results/text/study/beta200_s?.jsonl --last 10 --seeds

Each folder contains the `log.jsonl` of a training run; a log under another name is given as a file. Lines are training
batches, dots are held-out prompts: those of the log, or rows of a `results.jsonl` that are named after the folder and
the step (`beta0_s0 40`). `--last` prints means over the last steps. With `--seeds` runs that differ in the seed alone
(`NAME_s0`, `NAME_s1`) are one line, their mean, in a band from the lowest to the highest, and a last panel has the
diversity against the KL.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trl_drcd.evaluation.results import Result, read_results
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.validation.messages import one_line_errors

PANELS = {
    "kl": "KL to the guided teacher\n(nats per sequence)",
    "diversity": "diversity within a prompt\n(1 - cosine)",
    "entropy": "entropy\n(nats per token)",
    "adherence": "text adherence\n(cosine)",
}
# Their keys in results.jsonl
JUDGED = {"kl": "kl", "diversity": "diversity", "entropy": "entropy_per_token", "adherence": "adherence"}
# Okabe and Ito's colour-blind-safe palette, without its yellow, and grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"]


def judged_entries(results: list[Result], run: str) -> list[dict]:
    """Convert the rows of a run's checkpoints to entries of its log."""
    entries = []
    for line in results:
        name, _, step = line.name.rpartition(" ")
        if name == run and step.isdecimal():
            known = {key: metric for key, metric in JUDGED.items() if metric in line.metrics}
            means = {f"eval_{key}": line.metrics[metric]["mean"] for key, metric in known.items()}
            entries.append({"step": int(step), **means})
    return entries


def smoothed(values: list[float], width: int) -> np.ndarray:
    """Running means of `width` values, or fewer at the ends."""
    window, ones = np.ones(width), np.ones(len(values))
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same")


def by_seed(runs: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """The logs of each kind of run: `NAME_s<seed>` is of the kind `NAME`."""
    kinds: dict[str, list[list[dict]]] = {}
    for name, log in runs.items():
        kinds.setdefault(re.sub(r"_s\d+$", "", name), []).append(log)
    return kinds


def means_table(runs: dict[str, list[dict]], last: int) -> dict[str, dict[str, str]]:
    """Means over the last steps of batches, `mean (lowest to highest run)`; runs `NAME_s<seed>` as one row."""
    rows = {}
    for kind, whole in by_seed(runs).items():
        logs = [[e for e in log if e["step"] > log[-1]["step"] - last] for log in whole]
        rows[kind] = {"runs": str(len(logs))}
        for key in PANELS:
            values = [[entry[key] for entry in log if key in entry] for log in logs]
            if all(values):
                means = [float(np.mean(one)) for one in values]
                rows[kind][key] = f"{np.mean(means):.3g} ({min(means):.3g} to {max(means):.3g})"
    return rows


def draw(runs: dict[str, list[dict]], smooth: int = 1) -> Figure:
    """Plot one panel per quantity, one colour per run."""
    keys = [key for key in PANELS if any({key, f"eval_{key}"} & set(entry) for log in runs.values() for entry in log)]
    figure = Figure(figsize=(3.5 * len(keys), 3.4), layout="constrained")
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(keys))), keys, strict=True):
        for colour, (name, log) in zip(COLOURS, runs.items(), strict=False):
            lines = [(entry["step"], entry[key]) for entry in log if key in entry]
            if lines:
                steps, values = zip(*lines, strict=True)
                if smooth > 1:
                    axes.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
                axes.plot(steps, smoothed(values, min(smooth, len(values))), color=colour, lw=1.4, label=name)
            dots = [(entry["step"], entry[f"eval_{key}"]) for entry in log if f"eval_{key}" in entry]
            if dots:
                axes.plot(*zip(*dots, strict=True), color=colour, ls="" if lines else "-", lw=1.0, marker="o", ms=5)
        axes.set(xlabel="step", title=PANELS[key])
        if key != "adherence":  # a cosine, which may be below zero
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    dots = "lines: training batches; dots: held-out prompts"
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, title=dots)
    return figure


def draw_seeds(kinds: dict[str, list[list[dict]]], smooth: int = 1) -> Figure:
    """Plot the mean of the runs of each kind, at the steps that all of them logged, and diversity against KL."""
    curves: dict[str, dict[str, tuple[list[int], np.ndarray]]] = {}  # by kind and quantity: steps, (runs, steps)
    for kind, logs in kinds.items():
        for key in PANELS:
            found = [{entry["step"]: entry[key] for entry in log if key in entry} for log in logs]
            if steps := sorted(set.intersection(*map(set, found))):
                width = min(smooth, len(steps))
                values = np.stack([smoothed([one[step] for step in steps], width) for one in found])
                curves.setdefault(kind, {})[key] = steps, values
    keys = [key for key in PANELS if any(key in curve for curve in curves.values())]
    figure = Figure(figsize=(3.5 * (len(keys) + 1), 3.6), layout="constrained")
    *panels, last = np.atleast_1d(figure.subplots(1, len(keys) + 1))
    for colour, (kind, curve) in zip(COLOURS, curves.items(), strict=False):
        for axes, key in zip(panels, keys, strict=True):
            if key in curve:
                steps, values = curve[key]
                axes.plot(steps, values.mean(0), color=colour, lw=1.6, label=f"{kind} ({len(values)})")
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        if {"kl", "diversity"} <= set(curve):
            means = [dict(zip(curve[key][0], curve[key][1].mean(0), strict=True)) for key in ("kl", "diversity")]
            line = [[mean[step] for step in sorted(means[0].keys() & means[1].keys())] for mean in means]
            last.plot(*line, color=colour, lw=1.2, marker="o", ms=2.5)
            last.plot(*[values[-1:] for values in line], color=colour, marker="D", ms=7)
    for axes, key in zip(panels, keys, strict=True):
        axes.set(xlabel="step", title=PANELS[key])
    last.set(xlabel="KL (nats per sequence)", title="diversity against KL\n(diamond: the last step)")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, names = figure.axes[0].get_legend_handles_labels()
    title = "training batches; mean of the runs, lowest to highest"
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, title=title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of training runs, or their logs")
    parser.add_argument("--judged", type=Path, help="results.jsonl with rows of the runs' checkpoints")
    parser.add_argument("--smooth", type=int, default=1, help="values per running mean of the log; 1 for none")
    parser.add_argument("--last", type=int, help="print means over this many last steps")
    parser.add_argument("--seeds", action="store_true", help="one line for runs that differ in the seed alone")
    parser.add_argument("--output", type=Path, default=Path("outputs/curves.png"), help="PNG or SVG file")
    args = parser.parse_args()
    logs = {run: run if run.is_file() else run / "log.jsonl" for run in args.runs}
    if missing := [str(run) for run, log in logs.items() if not log.is_file()]:
        parser.error(f"no log.jsonl in {', '.join(missing)}")
    names = {run: run.stem if run.is_file() else run.resolve().name for run in args.runs}
    if len(set(names.values())) < len(args.runs):  # of the same study in two places
        names = {run: f"{run.resolve().parent.name}/{name}" for run, name in names.items()}
    if len(set(names.values())) < len(args.runs):
        parser.error("two runs have folders of the same name; the plot labels runs by it")
    lines = by_seed({name: [] for name in names.values()}) if args.seeds else names
    if len(lines) > len(COLOURS):
        parser.error(f"at most {len(COLOURS)} runs can be plotted, got {len(lines)}")
    if args.seeds and args.judged:
        parser.error("--judged has a row for each run; leave out --seeds")
    for name in ("smooth", "last"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    runs = {names[run]: [json.loads(line) for line in log.read_text().splitlines()] for run, log in logs.items()}
    if args.last:
        print(markdown_table(means_table(runs, args.last)))
    if args.judged:
        with one_line_errors("plot_runs.py"):
            judged = {name: judged_entries(read_results(args.judged), name) for name in runs}
        if unknown := [name for name, entries in judged.items() if not entries]:
            parser.error(f"{args.judged} has no row for {', '.join(unknown)}; rows are named `{unknown[0]} STEP`")
        runs = {name: log + judged[name] for name, log in runs.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure = draw_seeds(by_seed(runs), args.smooth) if args.seeds else draw(runs, args.smooth)
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
