"""
Do the weights of two diversity models steer two diversities apart?

Reads the results of recipes/music/evaluate_two_diversities.yaml and prints, for the models `timbre` and `harmony` and
for their merges with the quality model,

    (timbre's - harmony's diversity of timbre) - (timbre's - harmony's diversity of harmony)

and its two parts, with 95 % intervals over prompts; above 0, each model is more diverse in what it was rewarded for.
Beside them the difference in adherence, and the same of each model and the base.

    python recipes/music/two_diversities.py results/music/two_diversities/results.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

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


def main(argv: list[str] | None = None) -> None:
    """Print a table with a row per pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl")
    args = parser.parse_args(argv)
    with one_line_errors("two_diversities.py"):
        rows = {result.name: result for result in read_results(args.results)}
        if missing := sorted({name for pair in PAIRS.values() for name in pair} - set(rows)):
            raise ValueError(f"{args.results} lacks the rows {', '.join(missing)}; it has {', '.join(rows)}")
    table = {what: contrasts(rows[one], rows[other]) for what, (one, other) in PAIRS.items()}
    print(markdown_table({what: {key: formatted(value) for key, value in row.items()} for what, row in table.items()}))


if __name__ == "__main__":
    main()
