"""
Quality-diversity fronts: which points no other beats in both, the area they dominate, and intervals for both.

Letters: `n` points, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import bootstrap_draws


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"`points` must have shape (n, 2), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"`points` must be finite, got {points[~np.isfinite(points).all(1)][0]}")
    return points


def pareto_front(points: np.ndarray) -> np.ndarray:
    """
    The points that no other beats: none is at least as high in both coordinates and higher in one.

    Args:
        points (array): Shape `(n, 2)`, both coordinates maximised.

    Returns:
        `np.ndarray`: Their indices, int, by falling first coordinate. Of equal points each is one of the front.

    Raises:
        ValueError: If the shape is another, or a coordinate is not finite.
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
    Area that the points dominate above a reference point; the larger, the better the front.

    Args:
        points (array): Shape `(n, 2)`, both coordinates maximised; `n` may be 0.
        reference (`Sequence[float]`): Shape `(2,)`; points that are not above it in both coordinates add nothing.

    Returns:
        `float`: Unit of the first coordinate times that of the second.

    Raises:
        ValueError: If the shape is another, or a coordinate is not finite.
    """
    if len(points) == 0:
        return 0.0
    points, low = _checked(points), np.asarray(reference, dtype=np.float64)
    if low.shape != (2,) or not np.isfinite(low).all():
        raise ValueError(f"`reference` must be two finite numbers, got {reference}")
    front = points[pareto_front(points)]
    front = front[(front > low).all(1)]
    # Rectangles between one point's second coordinate and the next one's, which is higher
    below = np.concatenate([[low[1]], front[:-1, 1]])
    return float(((front[:, 0] - low[0]) * (front[:, 1] - below)).sum())


def front_difference(
    ours: np.ndarray, theirs: np.ndarray, reference: Sequence[float], resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """
    Difference of the hypervolumes of two fronts that were measured on the same prompts, with its bootstrap interval.

    Prompts are drawn with replacement, the same for both fronts; a point of a front is the mean over the prompts
    drawn. Ours lies above theirs at 95 % where `low` is above 0. Choosing the best of many points favours the longer
    front a little: compare fronts of like numbers of points.

    Args:
        ours, theirs (array): Quality and diversity of each strategy on each prompt, shapes `(n, P, 2)`, `(m, P, 2)`.
        reference (`Sequence[float]`): Of [`hypervolume`].
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, float]`: `mean`, `low`, `high`.

    Raises:
        ValueError: If the prompts differ in number.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.ndim != 3 or theirs.ndim != 3 or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(
            f"`ours` and `theirs` must have shapes (n, P, 2) and (m, P, 2), got {ours.shape}, {theirs.shape}"
        )

    def difference(rows: np.ndarray | slice) -> float:
        return hypervolume(ours[:, rows].mean(1), reference) - hypervolume(theirs[:, rows].mean(1), reference)

    values = [difference(draw) for draw in bootstrap_draws(ours.shape[1], resamples, seed)]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": difference(slice(None)), "low": float(low), "high": float(high)}


def above_diagonal(curve: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """
    How far a metric along lambda lies above the straight line between its ends: Fig. 4 (left) of the paper.

    Args:
        curve (array): The metric of each model on each prompt, shape `(n, P)`; the models in the order of `weights`.
        weights (`Sequence[float]`): lambda of each model, rising, from 0 to 1.

    Returns:
        `np.ndarray`: Shape `(n, P)`, the metric's unit; zero at the ends.

    Raises:
        ValueError: If the weights do not rise from 0 to 1.
    """
    curve, at = np.asarray(curve, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len(at) != len(curve) or len(at) < 2 or at[0] != 0 or at[-1] != 1 or (np.diff(at) <= 0).any():
        raise ValueError(f"`weights` must rise from 0 to 1, one for each of {len(curve)} models, got {list(weights)}")
    return curve - ((1 - at)[:, None] * curve[0] + at[:, None] * curve[-1])
