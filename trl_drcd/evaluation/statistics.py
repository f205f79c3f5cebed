"""
Intervals at 95 %: over prompts by bootstrap; over prompts and training seeds by Student's t.

Letters: `P` prompts, `R` training seeds. A statistic of several models is computed once for each *replicate* of their
means ([`Resampling.means`]), so that comparisons are paired: a replicate draws the same prompts and leaves out the
same training seed for all models.

With training seeds the variance of a statistic is the sum of two parts, over seeds and over prompts. The part over
seeds is the jackknife estimate (leave one out). The part over prompts is the variance of the bootstrap draws, with its
component that is linear in the prompts replaced by the jackknife estimate; for a mean both parts are then exactly
squared standard errors. A bootstrap over three seeds would be far too narrow: it underestimates their variance by the
factor `(R - 1) / R` and ignores how uncertain that estimate is. The interval is therefore Student's t with
Satterthwaite's degrees of freedom (https://doi.org/10.2307/3002019) for the sum. The sum counts the interaction of
prompts and seeds twice, so the interval is conservative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

LEVEL = 0.95
RESAMPLES = 2000


class Interval(TypedDict):
    """A value and the ends of its interval, all in the same unit."""

    mean: float
    low: float
    high: float


def times_drawn(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """
    How often each bootstrap draw contains each prompt; deterministic for given arguments.

    Args:
        prompts (`int`): `P`, the number of prompts and of draws with replacement.
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        `np.ndarray`: Shape `(1 + resamples, P)`, float; the first row is ones, the original prompts.
    """
    return _times_drawn(prompts, resamples, seed).copy()


@lru_cache(maxsize=4)
def _times_drawn(prompts: int, resamples: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, prompts, (resamples, prompts))
    return np.concatenate([np.ones((1, prompts)), [np.bincount(draw, minlength=prompts) for draw in draws]])


def percentile_interval(replicates: ArrayLike, level: float = LEVEL, centred: bool = False) -> Interval:
    """
    Percentile bootstrap interval of a statistic.

    Args:
        replicates (array): Shape `(1 + resamples,)`: the statistic on the original prompts, then on each draw. Draws
            that are NaN are ignored.
        level (`float`, *optional*, defaults to 0.95): Coverage, between 0 and 1.
        centred (`bool`, *optional*, defaults to `False`): Shift the draws so that their mean is the statistic; for a
            statistic that is biased by the repeated prompts of a draw.

    Returns:
        `Interval`: `mean` (the statistic on the original prompts), `low`, `high`.
    """
    value, drawn = float(np.asarray(replicates)[0]), np.asarray(replicates, dtype=np.float64)[1:]
    drawn = drawn - (drawn.mean() - value) if centred else drawn
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": value, "low": float(low), "high": float(high)}


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], float] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """
    A statistic and its percentile bootstrap interval over prompts.

    Prompts are drawn with replacement. The draws depend only on the seed and `P`, so that intervals of several models
    on the same prompts are paired. Columns are drawn together, for differences and ratios:
    `bootstrap_interval(np.stack([after, before], 1), lambda v: 1 - v[:, 0].mean() / v[:, 1].mean())`.

    Args:
        values (array): Shape `(P,)` or `(P, columns)`, one row per prompt.
        statistic (`Callable`, *optional*): Maps rows to a number; the mean, ignoring NaN, if `None`.
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        level (`float`, *optional*, defaults to 0.95): Coverage, between 0 and 1.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        `Interval`: `mean` (the statistic of all values), `low`, `high`; in the unit of the statistic.

    Raises:
        ValueError: If `values` is empty.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) == 0:
        raise ValueError("`values` is empty; expected one row per prompt")
    draws = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    if statistic is None:
        flat = rows.reshape(len(rows), -1)
        return percentile_interval([np.nanmean(flat), *np.nanmean(flat[draws], axis=(1, 2))], level)
    return percentile_interval([statistic(rows), *(statistic(rows[draw]) for draw in draws)], level)


def t_interval(
    mean: float, variances: Sequence[float], degrees_of_freedom: Sequence[float], level: float = LEVEL
) -> Interval:
    """
    Student's t interval of a value whose variance is a sum of independent estimates.

    The degrees of freedom are Satterthwaite's: `(sum v_i)^2 / sum(v_i^2 / f_i)`.

    Args:
        mean (`float`): The value.
        variances (`Sequence[float]`): The parts `v_i` of its variance (squared standard errors), each at least 0.
        degrees_of_freedom (`Sequence[float]`): Degrees of freedom `f_i` of each part.
        level (`float`, *optional*, defaults to 0.95): Coverage, between 0 and 1.

    Returns:
        `Interval`: `(-inf, inf)` if a part is not finite; of no width if all parts are zero.
    """
    parts, freedom = np.asarray(variances, dtype=np.float64), np.asarray(degrees_of_freedom, dtype=np.float64)
    variance = parts.sum()
    if not np.isfinite(variance):
        return {"mean": float(mean), "low": -np.inf, "high": np.inf}
    if variance == 0:
        return {"mean": float(mean), "low": float(mean), "high": float(mean)}
    shares = parts / variance  # divided first: squares of small variances underflow
    half = float(student.ppf((1 + level) / 2, 1 / (shares**2 / freedom).sum()) * np.sqrt(variance))
    return {"mean": float(mean), "low": float(mean) - half, "high": float(mean) + half}


def variance_of(values: np.ndarray) -> float:
    """Squared standard error of the mean of independent values, shape `(n,)`, `n` at least 2."""
    return float(np.var(values, ddof=1) / len(values))


TrainingSeeds = int | tuple[int, ...]
"""`n` for the training seeds 0 to n - 1, else the seeds."""


def _set_of(count: int, trainings: Sequence[int]) -> TrainingSeeds:
    own = tuple(trainings)
    return count if count == 1 or not own or own == tuple(range(count)) else own


def _count(seeds: TrainingSeeds) -> int:
    return seeds if isinstance(seeds, int) else len(seeds)


@dataclass(frozen=True)
class Resampling:
    """
    Resampling plan for statistics of several models: bootstrap draws of the prompts and, with several training seeds,
    jackknife replicates that leave out one prompt or one seed.

    Models with the same training seeds share them: leaving out the first seed of one leaves out the first of the
    others. Models with other seeds, or another number of them, are independent trainings.

    Args:
        prompts (`int`): `P`, the same prompts for all models.
        seeds (`tuple`): The sets of more than one training seed that occur: `n` for 0 to n - 1, else a tuple.
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.
    """

    prompts: int
    seeds: tuple[TrainingSeeds, ...] = ()
    resamples: int = RESAMPLES
    seed: int = 0

    @classmethod
    def of(cls, values: Iterable[np.ndarray], trainings: Iterable[Sequence[int]] = ()) -> Resampling:
        """
        The plan for models with these values of a metric, each of shape `(R, P)`.

        Args:
            values (`Iterable[np.ndarray]`): Of each model.
            trainings (`Iterable[Sequence[int]]`, *optional*): The training seeds of each model, `R` or none at all; 0
                to R - 1 if not given.

        Raises:
            ValueError: If `values` is empty, one has another shape, the models differ in their number of prompts, or
                there are several training seeds but only one prompt.
        """
        found = [np.shape(value) for value in values]
        shapes = set(found)
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[-1] for shape in shapes}) != 1:
            raise ValueError(f"`values` must have shapes (R, P) with one P and none of them 0, got {sorted(shapes)}")
        ((_, prompts), *_) = shapes
        given = list(trainings) or [()] * len(found)
        sets = {_set_of(shape[0], own) for shape, own in zip(found, given, strict=True) if shape[0] > 1}
        seeds = tuple(sorted(sets, key=lambda one: (_count(one), str(one))))
        if seeds and prompts < 2:
            raise ValueError(f"`values` must have at least 2 prompts if there are training seeds, got {prompts}")
        return cls(prompts, seeds)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Replicates of each kind: the statistic itself, bootstrap draws, prompts left out, seeds left out."""
        return (1, self.resamples, *((self.prompts, *map(_count, self.seeds)) if self.seeds else ()))

    def means(self, values: ArrayLike, trainings: Sequence[int] = ()) -> np.ndarray:
        """
        The mean over training seeds and prompts, followed by its replicates.

        Args:
            values (array): Shape `(R, P)`; values that are not finite are ignored.
            trainings (`Sequence[int]`, *optional*): Their training seeds; 0 to R - 1 if not given.

        Returns:
            `np.ndarray`: Shape `(sum(sizes),)`, in the order of [`sizes`].

        Raises:
            ValueError: If `values` has another shape.
        """
        given = np.asarray(values, dtype=np.float64)
        own = _set_of(len(given), trainings)
        if given.ndim != 2 or given.shape[1] != self.prompts or own not in (1, *self.seeds):
            raise ValueError(
                f"`values` must have shape (R, {self.prompts}) with R in {[1, *self.seeds]}, got {given.shape}"
            )
        times, known = _times_drawn(self.prompts, self.resamples, self.seed), np.isfinite(given)
        if self.seeds:
            times = np.concatenate([times, 1 - np.eye(self.prompts)])
        with np.errstate(invalid="ignore"):
            of_seeds = (times @ np.where(known, given, 0).T) / (times @ known.T)  # (replicates, R)
        means = [of_seeds.mean(1)]
        for seeds in self.seeds:
            left_out = [
                np.delete(of_seeds[0], r).mean() if own == seeds else means[0][0] for r in range(_count(seeds))
            ]
            means.append(np.array(left_out))
        return np.concatenate(means)

    def interval(self, replicates: np.ndarray, level: float = LEVEL) -> Interval:
        """
        The interval of a statistic of means: bootstrap percentiles, or Student's t if it depends on training seeds.

        Args:
            replicates (`np.ndarray`): Shape `(sum(sizes),)`: a function of [`means`], replicate by replicate.
            level (`float`, *optional*, defaults to 0.95): Coverage, between 0 and 1.

        Returns:
            `Interval`: `(-inf, inf)` if the statistic is NaN when one of the prompts or seeds is left out.

        Raises:
            ValueError: If `replicates` has another shape.
        """
        if replicates.shape != (sum(self.sizes),):
            raise ValueError(f"`replicates` must have shape ({sum(self.sizes)},), got {replicates.shape}")
        value, draws, *left_out = np.split(replicates, np.cumsum(self.sizes)[:-1])
        if all(np.allclose(block, value, rtol=1e-12, atol=0, equal_nan=True) for block in left_out[1:]):
            return percentile_interval(np.concatenate([value, draws]), level)
        # Around the statistic rather than the mean of the replicates, which also counts the jackknife's bias
        variances = [(len(block) - 1) * ((block - value) ** 2).mean() for block in left_out]
        variances[0] = self._variance_over_prompts(draws - value, left_out[0])
        return t_interval(float(value[0]), variances, [len(block) - 1 for block in left_out], level)

    def _variance_over_prompts(self, differences: np.ndarray, left_out: np.ndarray) -> float:
        """
        Variance of a statistic over prompts: the mean square of the `differences` of its bootstrap draws, shape
        `(resamples,)`, with the variance of its part that is linear in the prompts computed exactly from the
        leave-one-out replicates `left_out`, shape `(P,)`, instead of from the draws.
        """
        slopes = (1 - self.prompts) / self.prompts * (left_out - left_out.mean())
        linear = _times_drawn(self.prompts, self.resamples, self.seed)[1:] @ slopes
        not_linear = float(np.nanmean(differences**2 - linear**2))
        return self.prompts / (self.prompts - 1) * float(np.maximum(0, slopes @ slopes + not_linear))
