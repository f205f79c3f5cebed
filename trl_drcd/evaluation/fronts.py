"""
Quality-diversity fronts: Pareto-optimal points, hypervolume, difference of two fronts.

Letters: `n` points, `P` prompts. Functions that return one value per replicate get their interval from
[`~trl_drcd.evaluation.statistics.Resampling.interval`].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"`points` must have shape (n, 2), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"`points` must be finite, got {points[~np.isfinite(points).all(1)][0]}")
    return points


def pareto_front(points: np.ndarray) -> np.ndarray:
    """
    The Pareto-optimal points: no other point is at least as high in both coordinates and higher in one.

    Args:
        points (array): Shape `(n, 2)`, both coordinates maximised.

    Returns:
        `np.ndarray`: Their indices, int, by decreasing first coordinate. Duplicates of a point of the front are all in
        it.

    Raises:
        ValueError: If `points` has another shape, or a coordinate is not finite.
    """
    points = _checked(points)
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    front: list[int] = []
    for index in order:
        last = points[front[-1]] if front else None
        if last is None or points[index, 1] > last[1] or (points[index] == last).all():
            front.append(int(index))
    return np.array(front, dtype=int)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """
    Hypervolume: the area that the points dominate above a reference point; larger is better.

    Args:
        points (array): Shape `(n, 2)`, both coordinates maximised; `n` may be 0.
        reference (`Sequence[float]`): Shape `(2,)`; points that are not above it in both coordinates add nothing.

    Returns:
        `float`: In the product of the units of both coordinates.

    Raises:
        ValueError: If `points` or `reference` has another shape, or a coordinate is not finite.
    """
    if len(points) == 0:
        return 0.0
    points, low = _checked(points), np.asarray(reference, dtype=np.float64)
    if low.shape != (2,) or not np.isfinite(low).all():
        raise ValueError(f"`reference` must be two finite numbers, got {reference}")
    return float(hypervolumes(points[None], low)[0])


def hypervolumes(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> np.ndarray:
    """[`hypervolume`] of many fronts: `(draws, n, 2)` to `(draws,)`."""
    low = np.asarray(reference, dtype=np.float64)
    points = np.maximum(points, low)
    order = np.argsort(-points[..., 0], axis=1, kind="stable")
    x, y = (np.take_along_axis(points[..., i], order, 1) for i in (0, 1))
    # From right to left: strips between consecutive first coordinates, each as high as the highest point so far
    widths = x - np.append(x[:, 1:], np.full((len(x), 1), low[0]), 1)
    return (widths * (np.maximum.accumulate(y, 1) - low[1])).sum(1)


def front_difference(ours: np.ndarray, theirs: np.ndarray, reference: Sequence[float] | np.ndarray) -> np.ndarray:
    """
    Difference of the hypervolumes of two fronts.

    The maximum of many noisy points is biased upwards, which slightly favours the front with more points: compare
    fronts of similar numbers of points.

    Args:
        ours, theirs (array): Points of the fronts, replicate by replicate, shapes `(n, replicates, 2)` and
            `(m, replicates, 2)`, each coordinate of [`~trl_drcd.evaluation.statistics.Resampling.means`].
        reference (`Sequence[float]`): Reference point of [`hypervolume`], or one per replicate.

    Returns:
        `np.ndarray`: Shape `(replicates,)`, the unit of [`hypervolume`].

    Raises:
        ValueError: If the replicates differ in number.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.ndim != 3 or theirs.ndim != 3 or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(
            "`ours` and `theirs` must have shapes (n, replicates, 2) and (m, replicates, 2), got "
            f"{ours.shape}, {theirs.shape}"
        )
    return hypervolumes(ours.swapaxes(0, 1), reference) - hypervolumes(theirs.swapaxes(0, 1), reference)


def curve_difference(ours: np.ndarray, theirs: np.ndarray, steps: int = 33) -> np.ndarray:
    """
    Mean height of one curve above another over the diversities that both reach.

    Each curve interpolates linearly between its points by increasing diversity. A point that another of the same curve
    dominates is raised to the best quality that the curve reaches at that diversity or above, so that a curve that
    turns back is not penalised.

    Args:
        ours, theirs (array): Diversity and quality of the points, shapes `(n, replicates, 2)` and
            `(m, replicates, 2)`, see [`front_difference`]; one point alone is compared at its own diversity.
        steps (`int`, *optional*, defaults to 33): Number of diversities in the shared range at which the curves are
            compared.

    Returns:
        `np.ndarray`: Shape `(replicates,)`, the unit of quality; NaN where the ranges of diversity do not overlap.
    """
    a, b = _envelopes(ours), _envelopes(theirs)
    low, high = np.maximum(a[:, 0, 0], b[:, 0, 0]), np.minimum(a[:, -1, 0], b[:, -1, 0])
    at = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, steps)
    return np.where(low <= high, (_heights(a, at) - _heights(b, at)).mean(1), np.nan)


def height_above(points: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """
    Height of single points above a curve at each point's own diversity; beyond the curve's ends, above the nearer end.

    Args:
        points (array): Diversity and quality, shape `(replicates, 2)`.
        curve (array): Diversity and quality of the curve's points, in any order, shape `(n, replicates, 2)`; it
            interpolates as in [`curve_difference`].

    Returns:
        `np.ndarray`: Shape `(replicates,)`, the unit of quality.
    """
    return points[:, 1] - _heights(_envelopes(curve), points[:, :1])[:, 0]


def _envelopes(points: np.ndarray) -> np.ndarray:
    """`(n, draws, 2)` to `(draws, n, 2)` by increasing first coordinate, the second made non-increasing."""
    order = np.argsort(points[..., 0].T, axis=1, kind="stable")
    x, y = (np.take_along_axis(points[..., i].T, order, 1) for i in (0, 1))
    return np.stack([x, np.maximum.accumulate(y[:, ::-1], 1)[:, ::-1]], -1)


def _heights(curves: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`np.interp` for each draw: piecewise linear curves `(draws, n, 2)` evaluated at `(draws, steps)`."""
    result = np.repeat(curves[:, :1, 1], at.shape[1], 1)
    for left, right in zip(curves[:, :-1].swapaxes(0, 1), curves[:, 1:].swapaxes(0, 1), strict=True):
        width = np.where(right[:, 0] > left[:, 0], right[:, 0] - left[:, 0], 1)
        share = ((at - left[:, :1]) / width[:, None]).clip(0, 1)
        result = np.where(at >= left[:, :1], left[:, 1:] + share * (right[:, 1:] - left[:, 1:]), result)
    return result


def above_diagonal(curve: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """
    How far a metric along lambda lies above the straight line between its ends: Fig. 4 (left) of the paper.

    Args:
        curve (array): The metric of each model on each prompt, shape `(n, P)`; the models in the order of `weights`.
        weights (`Sequence[float]`): lambda of each model, increasing from 0 to 1.

    Returns:
        `np.ndarray`: Shape `(n, P)`, `m(l) - ((1 - l) m(0) + l m(1))`, in the metric's unit; zero at the ends.

    Raises:
        ValueError: If the weights do not increase from 0 to 1, or are not one per model.
    """
    curve, at = np.asarray(curve, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len(at) != len(curve) or len(at) < 2 or at[0] != 0 or at[-1] != 1 or (np.diff(at) <= 0).any():
        raise ValueError(f"`weights` must increase from 0 to 1, one per model ({len(curve)}), got {list(weights)}")
    return curve - ((1 - at)[:, None] * curve[0] + at[:, None] * curve[-1])
