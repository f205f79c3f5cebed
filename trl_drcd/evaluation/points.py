"""
Points from lines of `results.jsonl`: compute quality, pool training seeds, compare with paired replicates.

Letters: `n` points, `R` training seeds of a point, `P` prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from trl_drcd.evaluation.results import USUAL_TEMPERATURE, Result, rounded, with_metrics
from trl_drcd.evaluation.statistics import Interval, Resampling, bootstrap_interval, t_interval, variance_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Point(Result):
    """
    Rows that differ only in their training seed, pooled. Fields are those of the first row; `name` is the point's.

    Args:
        runs (`int`): `R`, the number of rows.
        training_seeds (`tuple[int, ...]`): Their training seeds, in order; empty if they have none.
        values (`dict`): Metric to its values, shape `(R, P)`, for metrics with values per prompt in all rows.
    """

    runs: int = 1
    training_seeds: tuple[int, ...] = ()
    values: dict[str, np.ndarray] = field(default_factory=dict)


# ---------------------------------------------------------------- quality


def with_quality(results: Sequence[Result], omega: str | float = 5.0) -> list[Result]:
    """
    Add `quality = omega * adherence + preference` per prompt, its interval, and the `omega` used.

    Without a preference in every line, quality is adherence and `omega` is `None`. The paper uses 5 to give both terms
    a similar range (Section 3.1). `"equal"` computes omega from the given lines: the range (largest minus smallest) of
    the mean preferences over that of the mean adherences, with training seeds pooled.

    Args:
        results (`list[Result]`): Lines; another omega needs no new measurement.
        omega (`str` or `float`, *optional*, defaults to 5.0): A number, or `"equal"`.

    Returns:
        `list[Result]`: New lines, in order; lines without adherence unchanged.

    Raises:
        ValueError: If `omega="equal"` and all mean adherences are equal.
    """
    has = [{"adherence", "preference"} <= set(line.per_prompt) for line in results]
    weight = None if not all(has) else equal_omega(results) if omega == "equal" else float(omega)
    return [_with_quality(line, weight) if "adherence" in line.per_prompt else line for line in results]


def _with_quality(line: Result, omega: float | None) -> Result:
    adherence = np.array(line.per_prompt["adherence"])
    quality = adherence if omega is None else omega * adherence + np.array(line.per_prompt["preference"])
    return with_metrics(line, {"quality": bootstrap_interval(quality)}, {"quality": rounded(quality)}, omega)


def equal_omega(results: Sequence[Result]) -> float:
    """The omega for which `omega * adherence` has the same range of means over points as the preference."""
    points = pooled(results)
    adherence, preference = (np.ptp([p.values[m].mean() for p in points]) for m in ("adherence", "preference"))
    if adherence == 0:
        raise ValueError("`omega=equal` needs points that differ in adherence, got equal means; give a number")
    return float(preference / adherence)


# ---------------------------------------------------------------- training seeds


def pooled(results: Iterable[Result]) -> list[Point]:
    """
    Pool rows that differ only in their training seed into points, with intervals over prompts and seeds.

    Args:
        results (`list[Result]`): Lines, with the same prompts.

    Returns:
        `list[Point]`: In order of first appearance.
    """
    groups: dict[str, list[Result]] = {}
    for line in results:
        groups.setdefault(line.point, []).append(line)
    return [_pool(name, lines) for name, lines in groups.items()]


def check_measured(points: Sequence[Point], metrics: Iterable[str]) -> None:
    """
    Check that metrics have values per prompt for all points.

    Raises:
        ValueError: If one has not; the message names those that have.
    """
    known = set.intersection(*(set(point.values) for point in points)) if points else set()
    if missing := sorted(set(metrics) - known):
        raise ValueError(f"`{missing[0]}` was not measured for all rows; they have {sorted(known)}")


def of_training_seed(results: Iterable[Result], seed: int | None) -> list[Result]:
    """
    Rows of one training seed, and those of strategies that have no training seeds; all rows if `seed` is `None`.

    Raises:
        ValueError: If no row is of that seed.
    """
    rows = list(results)
    known = sorted({row.training_seed for row in rows if row.training_seed is not None})
    if seed is not None and seed not in known:
        raise ValueError(f"`training_seed={seed}` is not in the results; they have {known}")
    return [row for row in rows if seed is None or row.training_seed in (None, seed)]


def _pool(name: str, lines: Sequence[Result]) -> Point:
    seeds = tuple(sorted(line.training_seed for line in lines if line.training_seed is not None))
    if len(seeds) == len(lines):  # points are paired training by training
        lines = sorted(lines, key=lambda line: line.training_seed or 0)
    else:
        seeds = ()
    first = lines[0]
    by_prompt = [key for key in first.per_prompt if all(key in line.per_prompt for line in lines)]
    values = {key: np.array([line.per_prompt[key] for line in lines]) for key in by_prompt}
    metrics = {key: one for key, one in first.metrics.items() if all(key in line.metrics for line in lines)}
    if len(lines) > 1:
        metrics = {
            key: _mean_of(values[key]) if key in values else _mean_of_intervals([x.metrics[key] for x in lines], first)
            for key in metrics
        }
    kept = {one.name: getattr(first, one.name) for one in fields(Result)}
    own = {"name": name, "metrics": metrics, "runs": len(lines), "training_seeds": seeds}
    return Point(**kept | own, values=values)


def _mean_of(values: np.ndarray) -> Interval:
    """Mean of values `(R, P)`, with its interval over training seeds and prompts."""
    resampling = Resampling.of([values])
    return resampling.interval(resampling.means(values))


def _mean_of_intervals(intervals: Sequence[Interval], about: Result) -> Interval:
    """
    Mean over training seeds of a metric without values per prompt. Its variance over prompts, which the seeds share,
    is inferred from the mean width of their intervals.
    """
    means = np.array([one["mean"] for one in intervals])
    half = float(np.mean([one["high"] - one["low"] for one in intervals])) / 2
    over_prompts = (half / NORMAL) ** 2
    freedom = [max(1, about.prompts - 1), len(means) - 1]
    return t_interval(float(means.mean()), [over_prompts, variance_of(means)], freedom)


NORMAL = 1.959964
"""Half the width of a normal distribution's 95 % interval, in standard errors."""


# ---------------------------------------------------------------- comparisons


class Comparison:
    """
    Compares statistics of points on the same prompts, replicate by replicate.

    A prompt on which a metric was not judged for one of the points is left out of that metric for all of them.

    Args:
        points (`Sequence[Point]`): At least one.

    Raises:
        ValueError: If a point has no values per prompt.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)
        if bare := [point.name for point in self.points if not point.values]:
            raise ValueError(f"{bare[0]} has no values per prompt, so it cannot be compared with others")
        self.resampling = Resampling.of(
            [next(iter(point.values.values())) for point in self.points],
            [point.training_seeds for point in self.points],
        )
        self._means: dict[tuple[str, str], np.ndarray] = {}
        self._told: set[str] = set()

    def means(self, point: Point, metric: str) -> np.ndarray:
        """Mean of a metric of a point, followed by its replicates, `(replicates,)`."""
        key = point.name, metric
        if key not in self._means:
            values = np.where(self._judged(metric), point.values[metric], np.nan)
            self._means[key] = self.resampling.means(values, point.training_seeds)
        return self._means[key]

    def _judged(self, metric: str) -> np.ndarray:
        """Whether each prompt was judged for every point that was judged at all, boolean `(P,)`."""
        known = [np.isfinite(point.values[metric]) for point in self.points if metric in point.values]
        judged: np.ndarray = np.all([one.all(0) for one in known if one.any()] or [known[0].any(0)], 0)
        if not judged.all() and metric not in self._told:
            self._told.add(metric)
            logger.warning(
                f"`{metric}` was not judged on {int((~judged).sum())} of {len(judged)} prompts for one of the points; "
                "these prompts are left out of it for all"
            )
        return judged

    def curve(self, points: Sequence[Point], *metrics: str) -> np.ndarray:
        """Means of metrics of points, followed by their replicates, `(n, replicates, len(metrics))`."""
        return np.array([np.stack([self.means(point, metric) for metric in metrics], -1) for point in points])

    def difference(self, ours: Point, theirs: Point, metric: str) -> np.ndarray:
        """Difference of a metric, ours minus theirs, `(replicates,)`."""
        return self.means(ours, metric) - self.means(theirs, metric)

    def interval(self, statistic: np.ndarray) -> Interval:
        """Interval of a statistic given as `(replicates,)`."""
        return self.resampling.interval(statistic)

    def correlation(self, points: Sequence[Point], x: str, y: str) -> Interval:
        """
        Pearson's correlation of two metrics over points.

        Raises:
            ValueError: If there are fewer than three points.
        """
        if len(points) < 3:
            raise ValueError(f"a correlation needs at least 3 points, got {len(points)}")
        both = self.curve(points, x, y)
        both = both - both.mean(0)
        a, b = both[..., 0], both[..., 1]
        with np.errstate(invalid="ignore"):
            return self.interval((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0)))


def correlation(points: Sequence[Point], x: str, y: str) -> Interval:
    """[`Comparison.correlation`] over the given points."""
    return Comparison(points).correlation(points, x, y)


# ---------------------------------------------------------------- groups of points


def by_strategy(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each strategy, in order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.strategy, []).append(point)
    return groups


def sweeps_base(group: Sequence[Point]) -> bool:
    """Whether the points of a strategy differ from the base only in guidance or only in temperature."""
    usual = all(p.temperature == USUAL_TEMPERATURE for p in group) or all(p.guidance_scale == 1 for p in group)
    return usual and not any(point.weights for point in group)


def guided_bases(points: Sequence[Point]) -> list[Point]:
    """
    The guided base at every scale, with one negative prompt: the teacher's or, if no scale up to the teacher's was
    sampled with that, the first point's.
    """
    guided = [point for point in points if point.is_guided_base()]
    as_teacher = [point for point in guided if point.negative_prompt == point.teacher_negative_prompt]
    if any(1 < point.guidance_scale <= point.teacher_guidance_scale for point in as_teacher):
        return as_teacher
    return [point for point in guided if point.negative_prompt == guided[0].negative_prompt]


def guidance_curve(points: Sequence[Point]) -> list[Point]:
    """The base and [`guided_bases`] up to the teacher's scale, in order."""
    curve = [p for p in guided_bases(points) if 1 < p.guidance_scale <= p.teacher_guidance_scale]
    return [point for point in points if point.is_base() or point in curve]


def starts_at_base(group: Sequence[Point]) -> bool:
    """Whether the base belongs to the curve of a strategy: a sweep of the base, or of a training's checkpoints."""
    return sweeps_base(group) or sweeps_training(group)


def sweeps_training(group: Sequence[Point]) -> bool:
    """Whether the points of a strategy are checkpoints of a training, sampled as the base is without guidance."""
    plain = all(point.guidance_scale == 1 and point.temperature == USUAL_TEMPERATURE for point in group)
    steps = {point.checkpoint for point in group}
    return plain and None not in steps and len(steps) > 1


def training_sweeps(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each strategy that sweeps the checkpoints of a training, by increasing step."""
    sweeps = {name: group for name, group in by_strategy(points).items() if sweeps_training(group)}
    return {name: sorted(group, key=lambda point: point.checkpoint or 0) for name, group in sweeps.items()}


def fronts_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """
    Fronts of at least two points: each sweep (one of the base, or along a training, also contains the base), and all
    single trained models together.
    """
    base = [point for point in points if point.is_base()]
    groups = by_strategy(point for point in points if not point.is_base() and not point.is_trained())
    fronts = {name: [*(base if starts_at_base(group) else []), *group] for name, group in groups.items()}
    fronts["trained models"] = [point for point in points if point.is_trained()]
    return {name: group for name, group in fronts.items() if len(group) > 1}


def lambda_of(point: Point) -> float:
    """
    The interpolation weight lambda of a point.

    Raises:
        ValueError: If it has none.
    """
    if point.interpolation_weight is None:
        raise ValueError(f"`{point.name}` has no interpolation weight")
    return point.interpolation_weight


def lambda_sweeps(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each strategy that sweeps lambda from 0 to 1, by increasing lambda."""
    groups = by_strategy(point for point in points if point.interpolation_weight is not None)
    sweeps = {name: sorted(group, key=lambda_of) for name, group in groups.items()}
    return {name: group for name, group in sweeps.items() if (lambda_of(group[0]), lambda_of(group[-1])) == (0, 1)}
