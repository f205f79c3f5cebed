"""
Do the weights of two diversity models steer two diversities apart?

Reads the results of recipes/music/evaluate_two_diversities.yaml and prints, for the models `timbre` and `harmony` and
for their merges with the quality model,

    (timbre's - harmony's diversity of timbre) - (timbre's - harmony's diversity of harmony)

and its two parts, with 95 % intervals over prompts; above 0, each model is more diverse in what it was rewarded for.
Beside them the difference in adherence, and the same of each model and the base.

    python recipes/music/two_diversities.py results/music/two_diversities/results.jsonl --figure figure.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trl_drcd.evaluation.results import Result, read_results
from trl_drcd.evaluation.statistics import Interval, t_interval, variance_of
from trl_drcd.evaluation.tables import formatted, markdown_table
from trl_drcd.validation.messages import one_line_errors

PAIRS = {
    "timbre - harmony": ("timbre", "harmony"),
    "merged with the quality model": ("half timbre (lambda 0.5)", "half harmony (lambda 0.5)"),
    "timbre - base": ("timbre", "base"),
    "harmony - base": ("harmony", "base"),
}


def contrasts(one: Result, other: Result) -> dict[str, Interval]:
    """
    Differences of two rows in the diversity of timbre and of harmony, the difference of these, and that of adherence.

    Args:
        one (`Result`): A row; `diversity` is that of timbre, `diversity_second` that of harmony.
        other (`Result`): Another, on the same prompts.

    Returns:
        `dict[str, Interval]`: Without unit, with Student's t intervals over prompts.
    """

    def difference(metric: str) -> np.ndarray:
        return np.array(one.per_prompt[metric]) - np.array(other.per_prompt[metric])

    def interval(values: np.ndarray) -> Interval:
        return t_interval(float(values.mean()), [variance_of(values)], [len(values) - 1])

    in_timbre, in_harmony = difference("diversity"), difference("diversity_second")
    return {
        "diversity of timbre": interval(in_timbre),
        "diversity of harmony": interval(in_harmony),
        "difference": interval(in_timbre - in_harmony),
        "adherence": interval(difference("adherence")),
    }


# Rows of the figure: marker colour and name; lines join a model, its merge and the quality model
SHOWN = {
    "base": ("black", "base"),
    "CFG (gamma 3)": ("0.55", "guidance 3"),
    "quality": ("#0072B2", "quality"),
    "timbre": ("#D55E00", "timbre"),
    "harmony": ("#009E73", "harmony"),
    "half timbre (lambda 0.5)": ("#E69F00", "quality + timbre"),
    "half harmony (lambda 0.5)": ("#56B4E9", "quality + harmony"),
    "timbre and harmony (lambda 0.5)": ("#CC79A7", "timbre + harmony"),
    "all three": ("0.3", "all three"),
}
LINES = (
    ("quality", "half timbre (lambda 0.5)", "timbre"),
    ("quality", "half harmony (lambda 0.5)", "harmony"),
    ("timbre", "timbre and harmony (lambda 0.5)", "harmony"),
)


def draw(rows: dict[str, Result]) -> Figure:
    """Plot the diversity of harmony against that of timbre, with standard errors over prompts."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    metrics = ("diversity", "diversity_second")
    at = {name: [float(np.mean(row.per_prompt[key])) for key in metrics] for name, row in rows.items()}
    for line in LINES:
        axes.plot(*np.array([at[name] for name in line if name in at]).T, color="0.8", linewidth=2, zorder=0)
    for name, (colour, label) in SHOWN.items():
        if name in rows:
            errors = [np.sqrt(variance_of(np.array(rows[name].per_prompt[key]))) for key in metrics]
            axes.errorbar(*at[name], errors[1], errors[0], fmt="o", color=colour, ecolor="0.85", zorder=2)
            axes.annotate(label, at[name], (6, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="diversity of timbre (1 - cosine)  →", ylabel="diversity of harmony (1 - cosine)  →")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Print a table with a row per pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl")
    parser.add_argument("--figure", type=Path, help="also plot all rows, to this file")
    args = parser.parse_args(argv)
    with one_line_errors("two_diversities.py"):
        rows = {result.name: result for result in read_results(args.results)}
        if missing := sorted({name for pair in PAIRS.values() for name in pair} - set(rows)):
            raise ValueError(f"{args.results} lacks the rows {', '.join(missing)}; it has {', '.join(rows)}")
    table = {what: contrasts(rows[one], rows[other]) for what, (one, other) in PAIRS.items()}
    print(markdown_table({what: {key: formatted(value) for key, value in row.items()} for what, row in table.items()}))
    if args.figure:
        draw(rows).savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
