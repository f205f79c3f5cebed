"""
Statistics of comparisons: win rates, Bradley-Terry scores and agreement, with intervals over prompts and raters.

Letters: `N` comparisons, `M` models, `D` bootstrap draws. Every statistic is a function of weights of the comparisons,
`(1 + D, N)`: the first row is ones, the others are bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from trl_drcd.compat.extras import require
from trl_drcd.evaluation.statistics import LEVEL, Interval, percentile_interval
from trl_drcd.ratings.comparisons import Comparisons

ELO_PER_NAT = 400 / np.log(10)
ELO_MEAN = 1000.0


@dataclass(frozen=True)
class Weights:
    """
    Bootstrap weights of `N` comparisons.

    Args:
        prompts, raters, single (`np.ndarray`): Weights from drawing prompts, raters, or single comparisons with
            replacement, each `(1 + D, N)`; the first row is ones.
    """

    prompts: np.ndarray
    raters: np.ndarray
    single: np.ndarray

    @property
    def each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All three."""
        return self.prompts, self.raters, self.single


def draw_weights(comparisons: Comparisons, draws: int = 1000, seed: int = 0) -> Weights:
    """
    Draw bootstrap weights: how often each comparison is in each draw.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        draws (`int`, *optional*, defaults to 1000): `D`.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        [`Weights`]: For [`crossed`].

    Raises:
        ValueError: If there are no comparisons.
    """
    if not len(comparisons):
        raise ValueError("`comparisons` is empty; expected at least one comparison")
    rng = np.random.default_rng(seed)
    groups = (comparisons.prompt, comparisons.rater, np.arange(len(comparisons)))
    ones = np.ones((1, len(comparisons)))
    return Weights(*(np.concatenate([ones, _drawn(group, draws, rng)]) for group in groups))


def _drawn(groups: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often the group of each comparison is drawn, `(draws, N)`."""
    names, numbers = np.unique(groups, return_inverse=True)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return times[:, numbers].astype(float)


def crossed(statistic: Callable[[np.ndarray], np.ndarray], weights: Weights) -> np.ndarray:
    """
    A statistic and bootstrap draws with its variance over prompts and raters.

    Comparisons of one prompt, or by one rater, are dependent. The two-way clustered variance is the variance over
    prompts, plus that over raters, minus that over single comparisons, which both contain (Cameron, Gelbach and
    Miller, "Robust inference with multiway clustering", 2011). The draws over prompts or over raters, whichever vary
    more, are stretched around the statistic to that variance, but never shrunk. (The product of weights of prompts
    and raters would triple the variance of independent comparisons.)

    Args:
        statistic (`Callable`): Maps weights `(1 + D, N)` to values `(1 + D, ...)`.
        weights ([`Weights`]): From [`draw_weights`].

    Returns:
        `np.ndarray`: Values `(1 + D, ...)` for `percentile_interval`, the statistic of all comparisons first.
    """
    return crossed_draws(*map(statistic, weights.each))


def crossed_draws(of_prompts: np.ndarray, of_raters: np.ndarray, of_single: np.ndarray) -> np.ndarray:
    """[`crossed`], given the values `(1 + D, ...)` for each of the three weights."""
    over_prompts, over_raters, over_single = map(_variance, (of_prompts, of_raters, of_single))
    by_raters = over_raters > over_prompts
    draws, over_draws = np.where(by_raters, of_raters, of_prompts), np.where(by_raters, over_raters, over_prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        stretch = np.fmax((over_prompts + over_raters - over_single) / over_draws, 1)
        spread = np.sqrt(np.where(over_draws > 0, stretch, 1))
    return draws[:1] + (draws - draws[:1]) * spread


def _variance(draws: np.ndarray) -> np.ndarray:
    """Variance over the finite draws of `(1 + D, ...)`; NaN if there are none."""
    known = np.isfinite(draws[1:])
    count = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, draws[1:], 0).sum(0) / count
        return np.where(known, (draws[1:] - mean) ** 2, 0).sum(0) / count


def win_and_tie_counts(comparisons: Comparisons, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Weighted counts of wins and ties.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights (`np.ndarray`): Shape `(1 + D, N)`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Wins of the row's model over the column's, and ties (symmetric), each `(1 + D,
        M, M)`.
    """
    size = len(comparisons.models)
    forth, back = comparisons.a * size + comparisons.b, comparisons.b * size + comparisons.a
    wins = np.zeros((len(weights), size * size))
    ties = np.zeros_like(wins)
    for cells, table, chosen in (
        (forth, wins, comparisons.outcome == 1),
        (back, wins, comparisons.outcome == 0),
        (forth, ties, comparisons.outcome == 0.5),
        (back, ties, comparisons.outcome == 0.5),
    ):
        one_hot = np.zeros((int(chosen.sum()), size * size))
        one_hot[np.arange(len(one_hot)), cells[chosen]] = 1
        table += weights[:, chosen] @ one_hot
    return wins.reshape(-1, size, size), ties.reshape(-1, size, size)


def win_rates(comparisons: Comparisons, weights: np.ndarray) -> np.ndarray:
    """
    Win rates `(W + T / 2) / (W + L + T)` of the row's model against the column's, Fig. 5 of
    https://huggingface.co/papers/2410.06084.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights (`np.ndarray`): Shape `(1 + D, N)`.

    Returns:
        `np.ndarray`: Shape `(1 + D, M, M)`; NaN where a pair was not compared.
    """
    wins, ties = win_and_tie_counts(comparisons, weights)
    total = wins + wins.transpose(0, 2, 1) + ties
    with np.errstate(invalid="ignore"):
        return (wins + ties / 2) / total


def bradley_terry_scores(comparisons: Comparisons, weights: np.ndarray) -> np.ndarray:
    """
    Bradley-Terry scores on the Elo scale with mean 1000, with a tie as half a win for each side.

    The win rate of A over B is modelled as `1 / (1 + 10 ** ((b - a) / 400))`. The scores are evalica's; those of the
    draws come from the same iteration, vectorised.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights (`np.ndarray`): Shape `(1 + D, N)`.

    Returns:
        `np.ndarray`: Shape `(1 + D, M)`; NaN in draws without finite scores, in which a model or group of models won
        nothing or lost nothing against the others.

    Raises:
        ImportError: If evalica is not installed (extra `app`).
    """
    wins, ties = win_and_tie_counts(comparisons, weights)
    beats = wins + ties / 2
    strengths = np.full(beats.shape[:2], np.nan)
    finite = _is_connected(beats)
    strengths[finite] = _strengths(beats[finite])
    if finite[0]:
        strengths[0] = _strengths_by_evalica(wins[0], ties[0])
    log_strengths = np.log(strengths)
    return ELO_MEAN + ELO_PER_NAT * (log_strengths - log_strengths.mean(1, keepdims=True))


def _strengths_by_evalica(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Strengths `(M,)` of one table of wins and ties, computed by evalica."""
    evalica = require("evalica", "app")
    a, b = np.nonzero(wins)
    c, d = np.nonzero(np.triu(ties))
    result = evalica.bradley_terry(
        [*a, *c], [*b, *d], [evalica.Winner.X] * len(a) + [evalica.Winner.Draw] * len(c),
        index=pd.Index(range(len(wins))), weights=[*wins[a, b], *ties[c, d]], tolerance=1e-8, limit=10_000,
    )  # fmt: skip
    return result.scores.sort_index().to_numpy()


def _strengths(beats: np.ndarray, tolerance: float = 1e-6, limit: int = 2000) -> np.ndarray:
    """
    The same as evalica for many tables at once, a hundred times faster; a test compares them.

    Newman's iteration, `p_i = sum_j(w_ij p_j / (p_i + p_j)) / sum_j(w_ji / (p_i + p_j))`, one model after the other:
    each step raises the likelihood. (All models at once, two models would exchange their values for ever.)

    Args:
        beats (`np.ndarray`): Wins plus half the ties, `(D, M, M)`, of tables with finite strengths, see
            [`_is_connected`].
        tolerance (`float`, *optional*, defaults to 1e-6): Largest relative change at convergence.
        limit (`int`, *optional*, defaults to 2000): Largest number of iterations.

    Returns:
        `np.ndarray`: Strengths `(D, M)`, of geometric mean 1; NaN where they have not converged.
    """
    strengths = np.ones(beats.shape[:2])
    changing = np.arange(len(beats))
    for _ in range(limit):
        if not len(changing):
            break
        old, new = strengths[changing], strengths[changing].copy()
        for model in range(beats.shape[1]):
            shares = 1 / (new[:, [model]] + new)
            won, lost = beats[changing, model], beats[changing, :, model]
            new[:, model] = (won * shares * new).sum(1) / (lost * shares).sum(1)
        new /= np.exp(np.log(new).mean(1, keepdims=True))
        strengths[changing] = new
        changing = changing[(np.abs(new / old - 1) > tolerance).any(1)]
    strengths[changing] = np.nan
    return strengths


def _is_connected(beats: np.ndarray) -> np.ndarray:
    """
    For each table, `(D, M, M)`, whether every model reaches every other through wins or ties; otherwise there are no
    finite scores (Ford, 1957).
    """
    reach = (beats > 0) | np.eye(beats.shape[1], dtype=bool)
    for middle in range(beats.shape[1]):
        reach |= reach[:, :, [middle]] & reach[:, [middle]]
    return np.asarray(reach.all(axis=(1, 2)))


def krippendorff_alpha(units: np.ndarray, distance: str = "ordinal") -> float:
    """
    Krippendorff's alpha: 1 for perfect agreement, 0 for agreement at chance level.

    Args:
        units (`np.ndarray`): Ratings, shape `(raters, units)`, NaN where there is none.
        distance (`str`, *optional*, defaults to `"ordinal"`): Distance of two ratings: `"nominal"`, `"ordinal"` or
            `"interval"`.

    Returns:
        `float`: Alpha; NaN if no unit has two ratings.

    Raises:
        ImportError: If evalica is not installed (extra `app`).
    """
    compared = units[:, (~np.isnan(units)).sum(0) > 1]
    if compared.size == 0:
        return float("nan")
    frame = pd.DataFrame(compared)
    return float(require("evalica", "app").alpha(frame, distance).alpha)


def agreement(comparisons: Comparisons, draws: int = 200, seed: int = 0) -> Interval:
    """
    Krippendorff's alpha (ordinal) of outcomes, with items as units, and its bootstrap interval over prompts.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        draws (`int`, *optional*, defaults to 200): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        [`Interval`]: `mean`, `low`, `high`; NaN if no item has two raters.
    """
    items, columns = np.unique(comparisons.item, return_inverse=True)
    units = np.full((comparisons.rater.max() + 1, len(items)), np.nan)
    units[comparisons.rater, columns] = comparisons.outcome
    prompt = np.zeros(len(items), dtype=int)
    prompt[columns] = comparisons.prompt
    prompts = np.unique(prompt)
    of_prompt = [np.flatnonzero(prompt == number) for number in prompts]
    rng = np.random.default_rng(seed)
    values = [krippendorff_alpha(units)]
    if np.isnan(values[0]):  # no item has two raters yet
        return {"mean": np.nan, "low": np.nan, "high": np.nan}
    for draw in rng.integers(0, len(prompts), (draws, len(prompts))):
        values.append(krippendorff_alpha(units[:, np.concatenate([of_prompt[i] for i in draw])]))
    return percentile_interval(np.array(values))


def design_effect(comparisons: Comparisons, weights: Weights) -> float:
    """
    Design effect: variance of a win rate over that of the same number of independent ratings; median over pairs.

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights ([`Weights`]): From [`draw_weights`].

    Returns:
        `float`: At least 1; NaN if no pair has a variance.
    """

    of_prompts, of_raters, of_single = (_variance(win_rates(comparisons, of)) for of in weights.each)
    of_both = of_prompts + of_raters - of_single
    known = np.triu(of_single, 1) > 0
    return max(1.0, float(np.median(of_both[known] / of_single[known]))) if known.any() else float("nan")


def outcome_variance(win_rate: float, ties: float = 0.0) -> float:
    """Variance of a single outcome (1, 0.5 or 0): `p (1 - p) - t / 4` for win rate `p` and share of ties `t`."""
    return win_rate * (1 - win_rate) - ties / 4


def win_rate_intervals(comparisons: Comparisons, weights: Weights) -> list[list[Interval | None]]:
    """
    Win rates with intervals over prompts and raters.

    If all comparisons of a pair came out alike, no draw of them varies. Then the share of other outcomes that the
    interval allows is the largest at which as many independent comparisons as there are prompts, or raters, if those
    are fewer but several, would still come out alike in one of 40 studies (Clopper and Pearson).

    Args:
        comparisons ([`Comparisons`]): The `N` comparisons.
        weights ([`Weights`]): From [`draw_weights`].

    Returns:
        `list[list]`: Of the row's model against the column's, `M` lists of `M`; `None` where a pair was not compared.
    """
    draws = np.clip(crossed(lambda of: win_rates(comparisons, of), weights), 0, 1)
    models = range(len(comparisons.models))

    def cell(row: int, column: int) -> Interval | None:
        if np.isnan(draws[0, row, column]):
            return None
        interval = percentile_interval(draws[:, row, column])
        of_pair = (np.minimum(comparisons.a, comparisons.b) == min(row, column)) & (
            np.maximum(comparisons.a, comparisons.b) == max(row, column)
        )
        rate, known = interval["mean"], draws[1:, row, column]
        if (known == rate)[~np.isnan(known)].all():
            of_each = [len(np.unique(numbers[of_pair])) for numbers in (comparisons.prompt, comparisons.rater)]
            other = 1 - ((1 - LEVEL) / 2) ** (1 / min([count for count in of_each if count > 1], default=1))
            return {"mean": rate, "low": rate * (1 - other), "high": rate + (1 - rate) * other}
        return interval

    return [[cell(row, column) for column in models] for row in models]


def named(draws: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Intervals of every column of `(1 + D, M)`, by name, with the share of undefined draws."""
    unknown: Interval = {"mean": np.nan, "low": np.nan, "high": np.nan}
    return {
        name: {
            **(percentile_interval(column) if np.isfinite(column[1:]).any() else unknown),
            "undefined_draws": float(np.isnan(column[1:]).mean()),
        }
        for name, column in zip(names, draws.T, strict=True)
    }
