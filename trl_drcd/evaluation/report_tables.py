"""The tables of a report: points, comparisons of fronts, curves along lambda, correlations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from trl_drcd.evaluation.fronts import above_diagonal, curve_difference, front_difference
from trl_drcd.evaluation.metrics import in_order, metric
from trl_drcd.evaluation.points import Comparison, Point, fronts_of, lambda_of, lambda_sweeps
from trl_drcd.evaluation.results import USUAL_TEMPERATURE
from trl_drcd.evaluation.tables import Table, formatted, verdict


def points_table(points: Sequence[Point]) -> Table:
    """Every point with the metrics that all points have, and its sampling cost."""
    known = set.intersection(*(set(point.metrics) for point in points))
    if "preference" not in known:
        known -= {"quality"}  # equal to adherence without a preference
    columns = [one for one in in_order(points[0].metrics) if one.column and one.key in known]
    speeds = [point.metrics["tokens_per_second"]["mean"] for point in points if "tokens_per_second" in known]
    unit = "codes" if points[0].kind == "music" else "tokens"
    rows = []
    for number, point in enumerate(points):
        name = point.name + (f" ({point.runs} trainings)" if point.runs > 1 else "")
        cells = [formatted(point.metrics[column.key]) for column in columns]
        timed = [f"{speeds[number]:.0f}", f"{speeds[0] / speeds[number]:.2f}"] if speeds else []
        rows.append([name, *cells, *timed, str(point.passes_per_token)])
    of_time = [f"{unit}/s", "time per token"] if speeds else []  # rows on further prompts have none
    header = ["", *(column.heading for column in columns), *of_time, "passes per token"]
    return Table("", header, rows)


def fronts_table(points: Sequence[Point], quality: str, diversity: str) -> Table:
    """
    Every pair of fronts: their mean difference in quality over the diversities that both reach, which decides which
    lies above, and the difference of their hypervolumes above the worst point of both, which also counts reach.
    """
    comparison, rows = Comparison(points), []
    for (a, ours), (b, theirs) in combinations(fronts_of(points).items(), 2):
        one, other = comparison.curve(ours, diversity, quality), comparison.curve(theirs, diversity, quality)
        area = front_difference(one, other, np.minimum(one[:, 0].min(0), other[:, 0].min(0)))
        heights = curve_difference(one, other)
        shared = np.isfinite(heights[0]) and np.isfinite(heights).mean() > 0.5
        height = comparison.interval(heights) if shared else None
        words = [formatted(height), verdict(height, "above", "below")] if height else ["no shared diversity", ""]
        rows.append([f"{a} - {b}", *words, formatted(comparison.interval(area), 4)])
    names = metric(quality).label, metric(diversity).label
    header = [
        "fronts", f"mean difference of {names[0]}", "the first is", f"difference of areas ({names[0]} x {names[1]})",
    ]  # fmt: skip
    return Table(f"Fronts in {names[0]} and {names[1]}", header, rows)


def lambda_table(points: Sequence[Point], metrics: Sequence[str]) -> Table:
    """How far each metric along lambda lies above the straight line between its ends, with paired intervals."""
    comparison, rows = Comparison(points), []
    for strategy, group in lambda_sweeps(points).items():
        at = [lambda_of(point) for point in group]
        gaps = [above_diagonal(comparison.curve(group, one)[..., 0], at) for one in metrics]
        for number in range(1, len(group) - 1):
            cells = [formatted(comparison.interval(gap[number])) for gap in gaps]
            rows.append([f"{strategy}, λ {at[number]:g}", *cells])
        if len(group) > 2:
            cells = [formatted(comparison.interval(gap[1:-1].mean(0))) for gap in gaps]
            rows.append([f"{strategy}, mean between the ends", *cells])
    return Table("Along lambda", ["above the straight line", *(metric(one).label for one in metrics)], rows)


def agreement_table(points: Sequence[Point], diversities: Sequence[str]) -> Table:
    """Correlations over points of the diversities with each other and with entropy: Appendix C.2 of the paper."""
    metrics = [m for m in (*diversities, "entropy_per_token") if all(m in p.values for p in points)]
    usual = [point for point in points if point.temperature == USUAL_TEMPERATURE]
    groups = {"all": points} | ({f"at temperature {USUAL_TEMPERATURE}": usual} if len(usual) < len(points) else {})
    comparison, rows = Comparison(points), []
    for a, b in combinations(metrics, 2) if min(map(len, groups.values())) > 2 else ():
        cells = [formatted(comparison.correlation(group, a, b)) for group in groups.values()]
        rows.append([f"{metric(a).label} and {metric(b).label}", *cells])
    header = ["correlation over strategies", *(f"{name} ({len(group)})" for name, group in groups.items())]
    return Table("Embedding diversity and entropy", header, rows)
