"""Correlation of an evaluation's metrics with ratings: Appendix C.2 of https://huggingface.co/papers/2410.06084."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from trl_drcd.evaluation.listening import heard
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.statistics import Interval, percentile_interval
from trl_drcd.ratings.comparisons import Comparisons
from trl_drcd.ratings.statistics import Weights, bradley_terry_scores, crossed, crossed_draws


def metric_values(results: Sequence[Result], models: Sequence[str], kept: int) -> dict[str, np.ndarray]:
    """
    Values of every metric that all models have, on the prompts whose samples were rated.

    Args:
        results (`Sequence[Result]`): Lines of `results.jsonl`.
        models (`Sequence[str]`): Names of the `M` models.
        kept (`int`): `P`, the number of prompts whose samples were kept, evenly spaced among those measured.

    Returns:
        `dict[str, np.ndarray]`: Name of a metric to its values, `(M, P)`.
    """
    of_model = {result.name: result.per_prompt for result in results}
    shared = [m for m in of_model[models[0]] if all(m in of_model[name] for name in models)]
    values = {}
    for metric in shared:
        every = np.array([of_model[name][metric] for name in models], dtype=float)
        values[metric] = every[:, heard(every.shape[1], kept)]
    return values


def correlations(
    comparisons: Comparisons, weights: Weights, metrics: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Interval | None]]:
    """
    Agreement of each metric with the ratings of one question.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights ([`Weights`]): From `draw_weights`.
        metrics (`Mapping[str, np.ndarray]`): From [`metric_values`], `(M, P)`.

    Returns:
        `dict`: Metric to `over_models`, Pearson's correlation of its means with the Bradley-Terry scores (`None` with
        fewer than 3 models), and `over_comparisons`, the correlation of its difference A - B on the prompt with the
        outcome; each with `mean`, `low`, `high`. The value on a prompt is the mean over all its samples, not only the
        rated ones.
    """
    scores = [bradley_terry_scores(comparisons, of) for of in weights.each]
    found: dict[str, dict[str, Interval | None]] = {}
    for metric, values in metrics.items():
        difference = values[comparisons.a, comparisons.prompt] - values[comparisons.b, comparisons.prompt]
        single = crossed(partial(correlation_of_differences, difference, comparisons.outcome), weights)
        found[metric] = {
            "over_models": _over_models(scores, values, comparisons, weights),
            "over_comparisons": _interval(single),
        }
    return found


def _interval(draws: np.ndarray) -> Interval | None:
    """The interval of a correlation; `None` if no draw is known, or none differs: of one comparison it is always 1."""
    known = draws[1:][np.isfinite(draws[1:])]
    return percentile_interval(np.clip(draws, -1, 1)) if len(known) and np.ptp(known) > 0 else None


def _over_models(
    scores: Sequence[np.ndarray], values: np.ndarray, comparisons: Comparisons, weights: Weights
) -> Interval | None:
    """Correlation over models, of scores for each of the weights; the metric's prompts have the ratings' weights."""
    if scores[0].shape[1] < 3:
        return None
    one_hot = np.zeros((len(comparisons), values.shape[1]))
    one_hot[np.arange(len(comparisons)), comparisons.prompt] = 1
    known = np.isfinite(values)  # others were not judged
    draws = []
    for of, score in zip(weights.each, scores, strict=True):
        of_prompt = of @ one_hot  # (1 + D, P)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append(_pearson(score, of_prompt @ np.where(known, values, 0).T / (of_prompt @ known.T)))
    return _interval(crossed_draws(*draws))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row, `(D, M)` and `(D, M)` to `(D,)`; NaN where a row is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def correlation_of_differences(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Pearson's correlation without centring, since A and B could be exchanged in any comparison.

    `sum(w x y') / sqrt(sum(w x^2) sum(w y'^2))` with `y' = y - 0.5`.

    Args:
        x (`np.ndarray`): Differences of a metric, A - B, `(N,)`; those that are not finite are left out.
        y (`np.ndarray`): Outcomes for A, in `[0, 1]`, `(N,)`.
        weights (`np.ndarray`): Weights of the comparisons, `(1 + D, N)`.

    Returns:
        `np.ndarray`: Shape `(1 + D,)`.
    """
    known = np.isfinite(x)
    x, y = np.where(known, x, 0.0), np.where(known, y - 0.5, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ (x * y)) / np.sqrt((weights @ x**2) * (weights @ y**2))
