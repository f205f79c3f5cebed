"""Win rates, scores, agreement and power: by hand, against closed forms, and on a truth that is known."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from trl_drcd.evaluation.statistics import percentile_interval
from trl_drcd.ratings.comparisons import Comparisons, comparisons_of, failed, inattentive
from trl_drcd.ratings.correlations import correlation_of_differences, correlations
from trl_drcd.ratings.power import PowerArguments, power_of, ratings_needed
from trl_drcd.ratings.simulated import Truth
from trl_drcd.ratings.statistics import (
    agreement,
    bradley_terry_scores,
    crossed,
    design_effect,
    draw_weights,
    krippendorff_alpha,
    win_and_tie_counts,
    win_rate_intervals,
    win_rates,
)


def comparisons(rows, models=("A", "B", "C")):
    """Of rows `(a, b, outcome, prompt, rater)`."""
    a, b, outcome, prompt, rater = map(np.array, zip(*rows, strict=True))
    return Comparisons(list(models), a, b, outcome.astype(float), prompt, rater, np.arange(len(rows)))


def ones(found):
    return np.ones((1, len(found)))


def test_win_rates_by_hand():
    """A against B: 2 wins, 1 loss, 1 tie: (2 + 1/2) / 4; B against C, written the other way: 1 win of C."""
    found = comparisons([(0, 1, 1, 0, 0), (0, 1, 1, 1, 0), (1, 0, 1, 2, 1), (0, 1, 0.5, 3, 1), (2, 1, 1, 0, 2)])
    rates = win_rates(found, ones(found))[0]
    assert rates[0, 1] == 0.625 and rates[1, 0] == 0.375
    assert rates[2, 1] == 1 and rates[1, 2] == 0
    assert np.isnan(rates[0, 2]) and np.isnan(rates[0, 0])
    wins, ties = win_and_tie_counts(found, ones(found))
    assert wins[0].tolist() == [[0, 2, 0], [1, 0, 0], [0, 1, 0]]
    assert ties[0].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_scores_of_two_models_have_a_closed_form():
    """Odds of (3 + 1/2) to (1 + 1/2), so the difference is 400 log10(3.5 / 1.5)."""
    found = comparisons([(0, 1, 1, 0, 0)] * 3 + [(1, 0, 1, 1, 0), (0, 1, 0.5, 2, 0)], ["A", "B"])
    a, b = bradley_terry_scores(found, ones(found))[0]
    assert a - b == pytest.approx(400 * np.log10(3.5 / 1.5), abs=1e-3)
    assert a + b == pytest.approx(2000)


def test_scores_are_the_maximum_of_the_likelihood():
    """At it, each model's wins are what its scores expect."""
    rng = np.random.default_rng(0)
    rows = [(*rng.choice(4, 2, replace=False), rng.choice([0, 0.5, 1]), i, i % 3) for i in range(300)]
    found = comparisons(rows, "ABCD")
    scores = bradley_terry_scores(found, ones(found))[0]
    wins, ties = win_and_tie_counts(found, ones(found))
    played = (wins + wins.transpose(0, 2, 1) + ties)[0]
    expected = played / (1 + 10 ** ((scores[None] - scores[:, None]) / 400))
    np.testing.assert_allclose((wins + ties / 2)[0].sum(1), expected.sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    "pairs",
    [[(0, 1)], [(0, 1), (2, 0), (0, 3)], [(0, 1), (1, 2), (2, 3), (3, 0)], list(combinations(range(4), 2))],
    ids=["two models", "all against one", "a ring", "all pairs"],
)
def test_draws_are_what_evalica_computes(pairs):
    rng = np.random.default_rng(0)
    rows = [(*pairs[i % len(pairs)], rng.choice([0, 0.5, 1], p=[0.2, 0.2, 0.6]), i % 40, i % 3) for i in range(400)]
    found = comparisons(rows, "ABCD"[: 1 + np.max(pairs)])
    weights = draw_weights(found, 20).prompts
    draws = bradley_terry_scores(found, weights)
    for draw in range(1, 21):  # the first row is evalica's
        np.testing.assert_allclose(bradley_terry_scores(found, weights[[draw]])[0], draws[draw], atol=0.01)


def test_scores_of_two_models_follow_from_their_win_rate():
    found = comparisons([(0, 1, int(i % 4 > 0), i, 0) for i in range(80)], "AB")
    weights = draw_weights(found, 50).prompts
    scores, rates = bradley_terry_scores(found, weights), win_rates(found, weights)[:, 0, 1]
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], 400 * np.log10(rates / (1 - rates)), atol=0.01)


def test_a_model_that_has_won_nothing_has_no_score():
    found = comparisons([(0, 1, 1, 0, 0), (0, 2, 1, 1, 0), (1, 2, 1, 2, 0), (2, 1, 1, 3, 0)])
    assert np.isnan(bradley_terry_scores(found, ones(found))).all()


def test_alpha_of_krippendorffs_own_example():
    """Krippendorff, "Computing Krippendorff's Alpha-Reliability", example C: 0.743 nominal, 0.815 ordinal, 0.849."""
    x = np.nan
    table = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ], dtype=float)  # fmt: skip
    assert krippendorff_alpha(table, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(table, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(table, "interval") == pytest.approx(0.849, abs=5e-4)
    assert np.isnan(krippendorff_alpha(np.array([[1.0, np.nan], [np.nan, 2.0]])))


def test_agreement_counts_raters_of_an_item():
    rows = [(0, 1, outcome, item // 2, rater) for item in range(20) for rater in range(3) for outcome in [item % 2]]
    found = comparisons(rows, ["A", "B"])
    items = np.repeat(np.arange(20), 3)
    same = Comparisons(found.models, found.a, found.b, found.outcome, found.prompt, found.rater, items)
    assert agreement(same, draws=20)["mean"] == 1


# ---------------------------------------------------------------- a truth that is known


def simulated(abilities, prompts, raters_per_item, raters, rng, prompt_noise=0.0, rater_noise=0.0, ties=0.3):
    """Every pair on every prompt; noise is added to abilities for each prompt, and for each rater."""
    size = len(abilities)
    values = np.asarray(abilities) + prompt_noise * rng.standard_normal((prompts, size))
    tastes = rater_noise * rng.standard_normal((raters, size))
    rows, items, item = [], [], 0
    names = [f"m{i}" for i in range(size)]
    for prompt in range(prompts):
        for a in range(size):
            for b in range(a + 1, size):
                for rater in rng.choice(raters, raters_per_item, replace=False):
                    truth = Truth({"quality": values[[prompt]] + tastes[rater]}, names, ties)
                    rows.append((a, b, truth.outcome("quality", 0, names[a], names[b], rng), prompt, rater))
                    items.append(item)
                item += 1
    found = comparisons(rows, names)
    return Comparisons(names, found.a, found.b, found.outcome, found.prompt, found.rater, np.array(items))


def test_a_tie_is_half_a_win_in_the_mean():
    truth = Truth({"quality": np.array([[0.8, 0.0]])}, ["a", "b"], ties=0.5)
    rng = np.random.default_rng(0)
    drawn = np.array([truth.outcome("quality", 0, "a", "b", rng) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.01)
    assert (drawn == 0.5).mean() == pytest.approx(0.5 * 2 * (1 - 1 / (1 + np.exp(-0.8))), abs=0.015)


def coverage(studies, draws, **settings):
    """Shares of the intervals that hold the truth: of scores' differences from the mean, and of win rates."""
    abilities = np.array([0.0, 0.4, 0.9])
    rng = np.random.default_rng(1)
    truth = 1000 + 400 / np.log(10) * (abilities - abilities.mean())
    wins = 1 / (1 + np.exp(abilities[None] - abilities[:, None]))
    held, held_rates = [], []
    for seed in range(studies):
        found = simulated(abilities, 30, 3, 9, rng, **settings)
        weights = draw_weights(found, draws, seed)
        scores = crossed(lambda of, found=found: bradley_terry_scores(found, of), weights)
        rates = crossed(lambda of, found=found: win_rates(found, of), weights)
        for model in range(3):
            interval = percentile_interval(scores[:, model])
            held.append(interval["low"] <= truth[model] <= interval["high"])
        for a, b in ((0, 1), (0, 2), (1, 2)):
            interval = percentile_interval(rates[:, a, b])
            held_rates.append(interval["low"] <= wins[a, b] <= interval["high"])
    return np.mean(held), np.mean(held_rates)


def test_intervals_hold_the_truth():
    """A 95 % interval may miss it in 5 % of studies; over 40 of them, three numbers each, 85 % is far below chance."""
    scores, rates = coverage(40, 150)
    assert scores > 0.87 and rates > 0.87


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    scores, rates = coverage(300, 300)
    assert 0.91 < scores < 0.985 and 0.91 < rates < 0.985


def test_single_ratings_would_be_too_sure():
    """Raters of one prompt who agree: intervals over single ratings are too narrow, and the design effect says so."""
    rng = np.random.default_rng(0)
    independent = simulated([0, 0.5], 60, 3, 12, rng, ties=0.0)
    noisy = simulated([0, 0.5], 60, 3, 12, rng, prompt_noise=4.0, ties=0.0)
    effects = [design_effect(found, draw_weights(found, 400)) for found in (independent, noisy)]
    assert effects[0] < 1.6 < effects[1] < 3.2  # 3 ratings of an item that always agree are worth one


@pytest.mark.parametrize("prompts", [1, 12])
def test_raters_who_are_always_alike_count_as_one_each(prompts):
    """Then nothing varies over prompts: 3 of 4 raters prefer A."""
    rows = [(0, 1, int(rater > 0), prompt, rater) for prompt in range(prompts) for rater in range(4)]
    found = comparisons(rows, "AB")
    cell = win_rate_intervals(found, draw_weights(found, 400))[0][1]
    assert cell["mean"] == 0.75 and cell["low"] < 0.5 and cell["high"] == 1


@pytest.mark.parametrize(
    ("prompts", "raters", "better"), [(1, 1, False), (20, 1, True), (20, 3, False), (20, 20, True)]
)
def test_an_interval_of_what_never_varies(prompts, raters, better):
    """Of n comparisons that all came out alike, it leaves room for others: (1 / 40) ** (1 / n)."""
    rows = [(0, 1, 1, prompt, rater) for prompt in range(prompts) for rater in range(raters)]
    for outcome in (1, 0.5):
        found = comparisons([(a, b, outcome, p, r) for a, b, _, p, r in rows], "AB")
        forth, back = (win_rate_intervals(found, draw_weights(found, 20))[i][1 - i] for i in (0, 1))
        assert (forth["low"], forth["high"]) == pytest.approx((1 - back["high"], 1 - back["low"]))
        assert forth["mean"] == outcome and forth["low"] < outcome
        assert forth["low"] == pytest.approx(outcome * 0.025 ** (1 / (prompts if raters == 1 else raters)))
        assert (forth["low"] > 0.5) == (better and outcome == 1)


def test_an_interval_of_a_win_and_a_tie_on_each_prompt():
    rows = [(0, 1, outcome, prompt, 0) for prompt in range(20) for outcome in (1, 0.5)]
    cell = win_rate_intervals(comparisons(rows, "AB"), draw_weights(comparisons(rows, "AB"), 20))[0][1]
    assert cell["low"] < cell["mean"] == 0.75 < cell["high"]


def test_raters_who_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    found = simulated([0, 0.5], 60, 3, 6, rng, rater_noise=3.0, ties=0.0)
    weights = draw_weights(found, 400)
    both = crossed(lambda of: win_rates(found, of), weights)[1:, 0, 1].std()
    over_prompts = win_rates(found, weights.prompts)[1:, 0, 1].std()
    assert both > 1.5 * over_prompts


# ---------------------------------------------------------------- metrics against ratings


def test_intervals_of_correlations_count_raters():
    rng = np.random.default_rng(0)
    found = simulated([0, 0, 0], 60, 3, 4, rng, rater_noise=2.0)
    metric = {"m": np.array([[0.0], [1], [2]]) + 0.1 * rng.standard_normal((3, 60))}
    weights = draw_weights(found, 400)
    over_prompts = draw_weights(replace(found, rater=np.arange(len(found))), 400)
    both, prompts = (correlations(found, each, metric)["m"]["over_models"] for each in (weights, over_prompts))
    assert both["high"] - both["low"] > 1.2 * (prompts["high"] - prompts["low"])


def test_one_comparison_has_no_correlation():
    found = comparisons([(0, 1, 1, 0, 0)], "AB")
    metric = {"m": np.array([[1.0], [0.0]])}
    assert correlations(found, draw_weights(found, 20), metric)["m"] == {"over_models": None, "over_comparisons": None}


def test_correlation_does_not_depend_on_sides():
    x, y = np.array([1.0, -2.0, 0.5]), np.array([1.0, 0.0, 0.5])
    weights = np.ones((1, 3))
    forth = correlation_of_differences(x, y, weights)
    x[1], y[1] = -x[1], 1 - y[1]
    assert correlation_of_differences(x, y, weights) == forth
    assert forth[0] == pytest.approx((0.5 + 1) / np.sqrt((1 + 4 + 0.25) * 0.5))


def test_the_metric_that_raters_follow_is_found():
    rng = np.random.default_rng(0)
    found = simulated([0, 0.7, 1.4, 2.1], 40, 3, 9, rng)
    metrics = {
        "followed": np.array([[0.0], [1], [2], [3]]) + 0.1 * rng.standard_normal((4, 40)),
        "noise": rng.standard_normal((4, 40)),
    }
    by_metric = correlations(found, draw_weights(found, 200), metrics)
    followed, noise = by_metric["followed"], by_metric["noise"]
    assert followed["over_models"]["low"] > 0.8 and followed["over_comparisons"]["low"] > 0.3
    assert noise["over_comparisons"]["low"] < 0 < noise["over_comparisons"]["high"]


# ---------------------------------------------------------------- attention, power


def rating(check=None, left=3, right=3, a_left=1, name="ann", **more):
    return {
        "question": "quality", "check_kind": check, "a_left": a_left, "score_left": left, "score_right": right,
        "preference": None, "pseudonym": name, "model_a": "A", "model_b": "B", "prompt": 0, "item": 0,
    } | more  # fmt: skip


def test_sides_are_undone():
    """A on the right, which was rated higher."""
    found = comparisons_of([rating(left=2, right=5, a_left=0), rating("same")], "quality", ["A", "B"])
    assert found.outcome.tolist() == [1.0]
    diverse = {"question": "diversity", "score_left": None, "score_right": None}
    rows = [rating(preference=5, a_left=side, **diverse) for side in (0, 1)]
    assert comparisons_of(rows, "diversity", ["A", "B"]).outcome.tolist() == [1.0, 0.0]


def test_attention_checks_fail():
    assert failed(rating("same", 1, 4)) and not failed(rating("same", 3, 4))
    assert failed(rating("worse", 3, 3)) and not failed(rating("worse", 4, 1)) and failed(rating("worse", 4, 1, 0))
    ratings = [rating("worse", 3, 3), rating("same", 3, 3), rating("worse", 1, 5, name="bob"), rating(name="eve")]
    assert inattentive(ratings) == ["bob"]
    assert inattentive(ratings, 0.4) == ["ann", "bob"]


def test_power_against_the_textbook():
    """(1.960 * 0.5 + 0.8416 * sqrt(0.57 * 0.43))^2 / 0.07^2 = 398.1"""
    assert ratings_needed(0.57) == 399
    assert ratings_needed(0.43) == 399
    assert ratings_needed(0.57, design_effect=2) == 797
    assert ratings_needed(0.57, ties=0.2) < 399
    assert power_of(399, 0.57) == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize(("count", "ties"), [(150, 0.2), (300, 0.3)])
def test_power_against_simulation(count, ties):
    rng = np.random.default_rng(0)
    drawn = rng.choice([1, 0.5, 0], p=[0.57 - ties / 2, ties, 0.43 - ties / 2], size=(4000, count))
    decided = np.abs(drawn.mean(1) - 0.5) > 1.96 * np.sqrt(0.25 - ties / 4) / np.sqrt(count)
    assert power_of(count, 0.57, ties) == pytest.approx(decided.mean(), abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"win_rate": 0.5}, "not 0.5"), ({"win_rate": 1.2}, "between 0 and 1"), ({"ties": 0.9}, "below 0.86"),
     ({"design_effect": 0.5}, "at least 1"), ({"power": 1.0}, "below 1")],
)  # fmt: skip
def test_power_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        PowerArguments(**wrong)
