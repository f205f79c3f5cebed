"""
How far above the curve of constant guidance do the other strategies of an evaluation lie?

The height of a point is its adherence minus that of the curve at its diversity
(`trl_drcd.evaluation.fronts.height_above`); with `--metric kl` and others of which less is better, how much less it
has. The curve goes through the base and its rows with guidance in all steps,
up to the teacher's scale; beyond its ends it is that of the nearest end.
Intervals (95 %) are over prompts, and training seeds where there are several.

    python recipes/music/heights.py outputs/early_steps/results.jsonl
    python recipes/music/heights.py results/early_steps/results.jsonl --differences "LERP (lambda 0.5)" rewarded
    python recipes/music/heights.py results/text/study/results.jsonl --metric kl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from trl_drcd.evaluation.fronts import height_above
from trl_drcd.evaluation.joining import FURTHER_PROMPTS_HELP, RESULTS_HELP, read_joined
from trl_drcd.evaluation.metrics import metric
from trl_drcd.evaluation.points import (
    Comparison,
    by_strategy,
    check_measured,
    guidance_curve,
    of_training_seed,
    pooled,
)
from trl_drcd.evaluation.tables import formatted, markdown_table
from trl_drcd.validation.messages import one_line_errors

DIVERSITIES = {"diversity": "height", "diversity_second": "height, not rewarded"}


def main(argv: list[str] | None = None) -> None:
    """Print a table with a row per point and, for a strategy of several, their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help=RESULTS_HELP)
    parser.add_argument("--further_prompts", type=Path, nargs="+", default=[], help=FURTHER_PROMPTS_HELP)
    parser.add_argument("--training_seed", type=int, help="only the models at this place of their lists")
    parser.add_argument("--metric", default="adherence", help="metric of the height (default: adherence)")
    parser.add_argument("--differences", nargs=2, metavar="POINT", help="also the first point - the second")
    args = parser.parse_args(argv)
    with one_line_errors("heights.py"):
        points = pooled(
            of_training_seed(read_joined(*args.results, further_prompts=args.further_prompts), args.training_seed)
        )
        curve = guidance_curve(points)
        if len(curve) < 2:
            raise ValueError(f"{args.results[0]} needs rows of the base with two guidance scales, got {len(curve)}")
        by_name = {point.name: point for point in points}
        if unknown := sorted(set(args.differences or []) - set(by_name)):
            raise ValueError(f"--differences: {args.results[0]} has no {unknown}; it has {list(by_name)}")
        check_measured(points, ("diversity", args.metric))
    comparison, table = Comparison(points), {}
    diversities = {key: name for key, name in DIVERSITIES.items() if all(key in point.values for point in points)}
    signs = np.array([1, -1 if metric(args.metric).better == "lower" else 1])
    of = {
        (point.name, diversity): height_above(
            signs * comparison.curve([point], diversity, args.metric)[0],
            signs * comparison.curve(curve, diversity, args.metric),
        )
        for point in points
        for diversity in diversities
    }
    for strategy, group in by_strategy(point for point in points if point not in curve).items():
        for point in group:
            row = {key: comparison.interval(comparison.means(point, key)) for key in (*diversities, args.metric)}
            row |= {name: comparison.interval(of[point.name, key]) for key, name in diversities.items()}
            table[point.name] = {key: formatted(value) for key, value in row.items()}
        if len(group) > 1:
            means = {key: np.mean([of[point.name, key] for point in group], 0) for key in diversities}
            table[f"{strategy}, mean"] = {
                name: formatted(comparison.interval(means[key])) for key, name in diversities.items()
            }
    if args.differences:
        one, other = args.differences
        row = {
            key: comparison.interval(comparison.difference(by_name[one], by_name[other], key))
            for key in (*diversities, args.metric)
        }
        row |= {name: comparison.interval(of[one, key] - of[other, key]) for key, name in diversities.items()}
        table[f"{one} - {other}"] = {key: formatted(value) for key, value in row.items()}
    print(markdown_table(table))


if __name__ == "__main__":
    main()
