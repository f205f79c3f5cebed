"""Intervals: against hand-computed constants, and by their coverage."""

import numpy as np
import pytest

from trl_drcd.evaluation.statistics import (
    Resampling,
    bootstrap_interval,
    percentile_interval,
    t_interval,
    times_drawn,
    variance_of,
)

# ---------------------------------------------------------------- bootstrap over prompts


def test_bootstrap_interval_of_a_known_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values)
    # The interval of a mean: 1.96 * s / sqrt(n) to each side
    half = 1.96 * values.std() / 20
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval([2.0] * 9 + [np.nan]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(values, np.nanmean))
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval([])


def test_bootstrap_intervals_are_paired():
    before = np.random.default_rng(1).normal(10.0, 5.0, 50)
    shift = bootstrap_interval((before - 1) - before)
    assert (shift["low"], shift["high"]) == pytest.approx((-1, -1))
    halved = bootstrap_interval(np.stack([before / 2, before], 1), lambda v: 1 - v[:, 0].mean() / v[:, 1].mean())
    assert list(halved.values()) == pytest.approx([0.5, 0.5, 0.5])


def test_draws_are_counts_and_percentiles_are_numpys():
    times = times_drawn(7, 30, seed=3)
    assert times.shape == (31, 7) and (times[0] == 1).all() and (times.sum(1) == 7).all()
    times[:] = 0  # a copy: the next call is not touched
    assert times_drawn(7, 30, seed=3).sum() == 31 * 7
    interval = percentile_interval([5.0, *range(101)], level=0.9)
    assert interval == pytest.approx({"mean": 5.0, "low": 5.0, "high": 95.0})
    moved = percentile_interval([5.0, *range(101)], level=0.9, centred=True)
    assert moved == pytest.approx({"mean": 5.0, "low": -40.0, "high": 50.0})


# ---------------------------------------------------------------- Student's t with Satterthwaite's degrees of freedom


def test_t_interval_by_hand():
    # One part: the textbook interval of (1, 2, 3), 2 -+ 4.302653 * 1 / sqrt(3)
    one = t_interval(2.0, [variance_of(np.array([1.0, 2.0, 3.0]))], [2])
    assert (one["low"], one["high"]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    # Two parts, 3 with 2 and 1 with 4 degrees of freedom: (3 + 1)^2 / (9 / 2 + 1 / 4) = 16 / 4.75 = 3.368421;
    # t(0.975) there is 2.994312 (3.182446 at 3, 2.776445 at 4), times sqrt(4)
    two = t_interval(0.0, [3.0, 1.0], [2, 4])
    assert two["high"] == pytest.approx(2 * 2.994312, abs=1e-5) and two["low"] == -two["high"]
    # A part without variance changes nothing
    assert t_interval(2.0, [1 / 3, 0.0], [2, 50]) == pytest.approx(one)
    assert t_interval(1.0, [0.0, 0.0], [2, 3]) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert t_interval(1.0, [np.nan, 1.0], [2, 3]) == {"mean": 1.0, "low": -np.inf, "high": np.inf}
    # Tiny variances neither underflow nor overflow
    tiny = t_interval(0.0, [1e-300, 3e-300], [2, 4])
    assert tiny["high"] > 0 and np.isfinite(tiny["high"])


def test_seeds_without_noise_of_prompts_are_a_t_interval_of_the_seeds():
    # Means 0, 1 and 5: mean 2, variance 7; 2 -+ 4.302653 * sqrt(7 / 3) = 2 -+ 6.572411
    values = np.array([[0.0], [1.0], [5.0]]) * np.ones((3, 60))
    resampling = Resampling.of([values])
    interval = resampling.interval(resampling.means(values))
    assert tuple(interval.values()) == pytest.approx((2, 2 - 6.572411, 2 + 6.572411), abs=1e-5)


def test_variances_over_prompts_and_seeds_are_those_of_their_means():
    values = np.random.default_rng(0).normal(size=(4, 1)) + np.random.default_rng(1).normal(size=(1, 9))
    resampling = Resampling.of([values])
    found = resampling.interval(resampling.means(values))
    parts = [values.mean(0).var(ddof=1) / 9, values.mean(1).var(ddof=1) / 4]
    assert found == pytest.approx(t_interval(values.mean(), parts, [8, 3]))


def test_what_is_not_linear_varies_as_its_draws_do():
    # |mean|, of prompts whose mean is about 0: the jackknife sees a slope of 1 or -1, the draws the kink
    values = np.random.default_rng(3).normal(size=(3, 50)) * 0.01 + np.random.default_rng(4).normal(size=(1, 50))
    values -= values.mean()
    resampling = Resampling.of([values])
    means = resampling.means(values)
    linear, kinked = resampling.interval(means), resampling.interval(np.abs(means))
    draws = np.abs(means[1:2001]) - np.abs(means[0])
    expected = np.sqrt((draws**2).mean())  # mean squared deviation of the draws from the statistic
    assert (linear["high"] - linear["low"]) / 2 == pytest.approx(2.01 * values.mean(0).std(ddof=1) / 50**0.5, rel=0.01)
    assert (kinked["high"] - kinked["low"]) / 2 == pytest.approx(2.01 * expected, rel=0.05)


def test_one_training_is_the_bootstrap_over_prompts_also_beside_others_with_several():
    generator = np.random.default_rng(0)
    one, three = generator.normal(size=(1, 60)), generator.normal(size=(3, 60))
    alone, both = Resampling.of([one]), Resampling.of([one, three])
    assert (alone.seeds, both.seeds, both.sizes) == ((), (3,), (1, 2000, 60, 3))
    expected = pytest.approx(bootstrap_interval(one[0]))
    assert alone.interval(alone.means(one)) == expected and both.interval(both.means(one)) == expected
    # A difference has the seeds of what has some
    difference = both.interval(both.means(three) - both.means(one))
    values = three - one
    parts = [values.mean(0).var(ddof=1) / 60, values.mean(1).var(ddof=1) / 3]
    assert difference == pytest.approx(t_interval(values.mean(), parts, [59, 2]))


def test_seeds_of_like_number_are_paired_and_others_are_apart():
    generator = np.random.default_rng(0)
    trainings, prompts = generator.normal(size=(3, 1)), generator.normal(size=(1, 20))
    ours, theirs = trainings + prompts, trainings + prompts - 1
    resampling = Resampling.of([ours, theirs])
    paired = resampling.interval(resampling.means(ours) - resampling.means(theirs))
    assert tuple(paired.values()) == pytest.approx((1, 1, 1))
    two = theirs[:2]
    resampling = Resampling.of([ours, two])
    assert resampling.seeds == (2, 3)
    apart = resampling.interval(resampling.means(ours) - resampling.means(two))
    parts = [0.0, two.mean(1).var(ddof=1) / 2, ours.mean(1).var(ddof=1) / 3]
    assert apart == pytest.approx(t_interval(ours.mean() - two.mean(), parts, [19, 1, 2]))


def test_what_is_missing_is_left_out_and_what_is_unknown_has_no_ends():
    values = np.random.default_rng(0).normal(size=(1, 8))
    values[0, 0] = np.nan
    resampling = Resampling.of([values])
    assert resampling.means(values)[0] == pytest.approx(values[0, 1:].mean())
    seeds = np.ones((2, 8))
    resampling = Resampling.of([seeds])
    replicates = resampling.means(seeds)
    replicates[-1] = np.nan
    assert resampling.interval(replicates) == {"mean": 1.0, "low": -np.inf, "high": np.inf}


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(R, P\) with one P and none of them 0, got \[\(2, 3\), \(2, 4\)\]"):
        Resampling.of([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(ValueError, match=r"got \[\(60,\)\]"):
        Resampling.of([np.ones(60)])
    with pytest.raises(ValueError, match="at least 2 prompts if there are training seeds, got 1"):
        Resampling.of([np.ones((2, 1))])
    with pytest.raises(ValueError, match=r"shape \(R, 3\) with R in \[1, 2\], got \(3, 3\)"):
        Resampling(3, (2,)).means(np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"`replicates` must have shape \(2006,\), got \(2001,\)"):
        Resampling(3, (2,)).interval(np.ones(2001))


@pytest.mark.parametrize("seed_deviation", [0.0, 0.3, 1.0])
def test_the_interval_over_three_seeds_covers(seed_deviation):
    """Of 400 crossed samples of 3 trainings and 20 prompts, the interval of a ratio of two means holds the truth."""
    generator, hits, naive = np.random.default_rng(0), 0, 0
    resampling = Resampling(20, (3,), resamples=2)
    for _ in range(400):
        prompts = generator.normal(size=(1, 20))
        ours, theirs = (
            level + seed_deviation * generator.normal(size=(3, 1)) + prompts + 0.3 * generator.normal(size=(3, 20))
            for level in (12.0, 10.0)
        )
        interval = resampling.interval(resampling.means(ours) / resampling.means(theirs))
        hits += interval["low"] <= 1.2 <= interval["high"]
        drawn = [
            ours[np.ix_(r, p)].mean() / theirs[np.ix_(r, p)].mean()
            for r, p in zip(generator.integers(0, 3, (40, 3)), generator.integers(0, 20, (40, 20)), strict=True)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975])
        naive += low <= 1.2 <= high
    assert 0.92 <= hits / 400 <= 1.0
    if seed_deviation == 1:
        assert naive / 400 < 0.85  # a bootstrap of three seeds


def test_the_interval_is_not_wider_than_it_must_be():
    """Mean width against that of the t interval with the true number of degrees of freedom, where seeds dominate."""
    generator = np.random.default_rng(0)
    resampling = Resampling(20, (3,), resamples=2)
    widths = []
    for _ in range(300):
        values = generator.normal(size=(3, 1)) + 0.1 * generator.normal(size=(3, 20))
        interval = resampling.interval(resampling.means(values))
        widths.append(interval["high"] - interval["low"])
    # 2 * 4.302653 * E[s] / sqrt(3), with E[s] = 0.886227 sigma of three values
    assert np.mean(widths) == pytest.approx(2 * 4.302653 * 0.886227 / 3**0.5, rel=0.08)
