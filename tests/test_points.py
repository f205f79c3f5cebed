"""Lines of results.jsonl as points: quality, training seeds, fronts, the paper's claims, plots."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from trl_drcd.evaluation.claims import UNANSWERED, Evidence, claims, claims_tables
from trl_drcd.evaluation.plots import agreement_plot, front_plot, lambda_plot, training_plot
from trl_drcd.evaluation.points import (
    Comparison,
    Point,
    correlation,
    equal_omega,
    fronts_of,
    guidance_curve,
    pooled,
    with_quality,
)
from trl_drcd.evaluation.report_tables import agreement_table, fronts_table, lambda_table, points_table
from trl_drcd.evaluation.results import Result

PROMPTS = 40
NOISE = np.random.default_rng(0).normal(size=PROMPTS) * 0.05  # the same prompts are hard for all


def line(strategy, adherence, diversity, entropy=1.0, preference=None, point=None, **about):
    """A line whose metrics have the given means, with a little noise of the line's own."""
    name = point or strategy
    own = np.random.default_rng(zlib.crc32(f"{strategy} {about}".encode())).normal(size=(4, PROMPTS)) * 0.004
    own -= own.mean(1, keepdims=True)
    values = {"adherence": adherence + NOISE + own[0], "diversity": diversity + NOISE + own[1]}
    values["entropy_per_token"] = entropy + own[2]
    if preference is not None:
        values["preference"] = preference + own[3]
    metrics = {key: {"mean": value.mean(), "low": value.mean(), "high": value.mean()} for key, value in values.items()}
    metrics["tokens_per_second"] = dict.fromkeys(("mean", "low", "high"), 100.0)
    given = {"strategy": strategy, "name": name, "point": name, "model": name, "prompts": PROMPTS} | about
    return Result.from_json(given | {"metrics": metrics, "per_prompt": {k: v.tolist() for k, v in values.items()}})


ALL = "quality + beta 5 + diversity"


def world(bulge=0.0, quality_model=0.5):
    """Every role that a claim asks for; along lambda quality rises above the straight line by `bulge`."""
    lines = [line("base", 0.3, 0.5, 2.0), line("trained", 0.3, 0.35, weights=[1.0], diversity_coef=5, point="beta 5")]
    lines += [line("CFG", 0.5, 0.3, guidance_scale=3.0, point="CFG 3")]
    lines += [line("temperature", 0.25, 0.52, temperature=1.2, point="T 1.2")]
    lines += [line("quality", quality_model, 0.29, weights=[1.0], diversity_coef=0)]
    lines += [line("diversity", 0.4, 0.6, 0.9, weights=[1.0], diversity_coef=15)]
    for at in (0.0, 0.5, 1.0):
        adherence = (1 - at) * quality_model + at * 0.4 + (bulge if at == 0.5 else 0)
        weights = {"weights": [1 - at, at], "interpolation_weight": at, "model": "quality + diversity"}
        lines.append(line("LERP", adherence, 0.29 + at * 0.31, point=f"LERP {at}", **weights))
    return [*lines, line("uniform", 0.6, 0.4, weights=[1 / 3] * 3, model=ALL)]


def test_trainings_are_paired_by_their_numbers():
    """Whatever the order of the rows, as in two files that were joined."""
    trained = [
        line(name, 0.1 * seed + more, 0.5, point=name, training_seed=seed, model=f"{name}{seed}")
        for name, more in (("a", 0.0), ("b", 0.2)) for seed in range(4)
    ]  # fmt: skip
    widths = []
    for order in (trained, [*trained[:4], *reversed(trained[4:])]):
        ours, theirs = pooled(order)
        assert ours.training_seeds == theirs.training_seeds == (0, 1, 2, 3)
        comparison = Comparison([ours, theirs])
        interval = comparison.interval(comparison.difference(theirs, ours, "adherence"))
        assert interval["mean"] == pytest.approx(0.2, abs=1e-6)
        widths.append(interval["high"] - interval["low"])
    assert widths[0] == pytest.approx(widths[1]) and widths[0] < 0.01  # a training differs from the next by 0.1
    alone = pooled([trained[3], trained[7]])  # one training of each, number 3
    assert Comparison(alone).interval(Comparison(alone).difference(*reversed(alone), "adherence"))["high"] < 0.21
    unknown = pooled([*trained[:2], replace(trained[2], training_seed=None)])  # of an earlier version
    assert unknown[0].training_seeds == () and np.isfinite(Comparison(unknown).means(unknown[0], "adherence")).all()
    ours, theirs = pooled([*trained[:3], *trained[4:6], trained[7]])
    comparison = Comparison([ours, theirs])  # 0, 1, 2 and 0, 1, 3: independent trainings
    interval = comparison.interval(comparison.difference(theirs, ours, "adherence"))
    assert interval["high"] - interval["low"] > 0.4


def test_quality_is_made_of_its_parts():
    lines = [line("a", 0.2, 0.5, preference=-3.0), line("b", 0.4, 0.5, preference=-2.0)]
    five = with_quality(lines)
    assert five[0].omega == 5 and five[0].metrics["quality"]["mean"] == pytest.approx(5 * 0.2 - 3, abs=0.1)
    expected = 5 * np.array(lines[0].per_prompt["adherence"]) + lines[0].per_prompt["preference"]
    np.testing.assert_allclose(five[0].per_prompt["quality"], expected, rtol=1e-5)
    assert "quality" not in lines[0].metrics
    # The preference's means span 1, those of the adherence 0.2
    assert equal_omega(lines) == pytest.approx(1 / 0.2, rel=1e-6)
    assert with_quality(five, "equal")[1].omega == pytest.approx(5)
    without = with_quality([line("a", 0.2, 0.5)], "equal")
    assert without[0].omega is None
    assert without[0].per_prompt["quality"] == pytest.approx(without[0].per_prompt["adherence"], rel=1e-5)
    with pytest.raises(ValueError, match="give a number"):
        with_quality([lines[0], lines[0]], "equal")


def test_training_seeds_are_one_point():
    lines = [line("q", at, 0.5, point="q", weights=[1.0], training_seed=i) for i, at in enumerate((0.3, 0.5, 0.4))]
    (point,) = pooled(lines)
    assert point.runs == 3 and point.values["adherence"].shape == (3, PROMPTS)
    interval = point.metrics["adherence"]
    assert interval["mean"] == pytest.approx(0.4 + NOISE.mean(), abs=1e-6)
    # Seeds 0.3, 0.4, 0.5: variance 0.01, standard error 0.0577; the prompts' 0.05 / sqrt(40) is a seventh of it
    over_prompts, over_seeds = (NOISE.var(ddof=1) / PROMPTS), 0.01 / 3
    freedom = (over_prompts + over_seeds) ** 2 / (over_prompts**2 / (PROMPTS - 1) + over_seeds**2 / 2)
    half = student.ppf(0.975, freedom) * (over_prompts + over_seeds) ** 0.5
    assert 2 < freedom < 2.1
    assert (interval["high"] - interval["low"]) / 2 == pytest.approx(half, rel=0.01)
    assert point.metrics["tokens_per_second"]["mean"] == 100
    assert points_table([point]).rows[0][0] == "q (3 trainings)"


def test_fronts_have_the_base_in_its_own_sweeps():
    fronts = fronts_of(pooled(world()))
    members = {name: [p.name for p in group] for name, group in fronts.items()}
    assert members == {
        "CFG": ["base", "CFG 3"], "temperature": ["base", "T 1.2"], "LERP": ["LERP 0.0", "LERP 0.5", "LERP 1.0"],
        "trained models": ["beta 5", "quality", "diversity"],
    }  # fmt: skip


def test_the_claims_hold_where_they_are_true():
    answers = claims(pooled(world(bulge=0.06)), "adherence", "diversity")
    assert [claim.verdict for claim in answers] == ["holds"] * 11
    numbers = answers[0].numbers["CFG - base"]
    assert numbers["mean"] == pytest.approx(0.2) and 0.19 < numbers["low"] < numbers["high"] < 0.21
    # At diversity 0.35 the best merged model there or above is that of lambda 0.5: 0.5 - 0.05 + 0.06 against 0.3
    assert answers[5].numbers["merged - coefficient 5"]["mean"] == pytest.approx(0.21)


def test_the_claims_fail_where_they_are_false():
    answers = {claim.text.split(" (")[0]: claim.verdict for claim in claims(
        pooled(world(bulge=-0.08, quality_model=0.35)), "adherence", "diversity"
    )}  # fmt: skip
    assert answers["distillation reaches CFG's quality without CFG"] == "fails"
    assert answers[
        "along lambda quality lies above the straight line between the ends, and diversity not below it"
    ] == ("fails")
    assert answers["CFG buys quality"] == "holds"


def test_a_curve_that_only_moves_late_is_no_gain():
    lines = world(bulge=0.06)
    middle = next(line for line in lines if line.name == "LERP 0.5")
    middle.per_prompt["diversity"] = [value - 0.1 for value in middle.per_prompt["diversity"]]
    answer = claims(pooled(lines), "adherence", "diversity")[9]
    assert answer.numbers["quality, mean between the ends"]["low"] > 0 and answer.verdict == "fails"


def test_the_merged_models_are_those_of_the_trained_ends():
    lines = world(bulge=0.06)
    other = [line("towards", 0.1, 0.1, interpolation_weight=at, weights=[1 - at, at], model="quality + base",
                  point=f"towards {at}") for at in (0.0, 0.5, 1.0)]  # fmt: skip
    first = Evidence(pooled([*other, *lines]), "adherence", "diversity")
    assert [p.name for p in first.lerp] == ["LERP 0.0", "LERP 0.5", "LERP 1.0"]
    assert {p.strategy for p in first.pairs} == {"LERP"}


def test_the_mean_of_the_seeds_of_one_end_is_no_average_of_all():
    mean = line("mean of quality", 0.6, 0.2, weights=[1 / 3] * 3, model="quality + quality_s1 + quality_s2")
    found = Evidence(pooled([mean, *world()]), "adherence", "diversity")
    assert found.uniform is not None and found.uniform.name == "uniform"
    alone = [one for one in world() if one.name != "uniform"]
    assert Evidence(pooled([mean, *alone]), "adherence", "diversity").uniform is None


def test_guidance_with_early_steps_is_no_part_of_the_curve_of_guidance():
    """First, so that it would be taken for the teacher's guidance."""
    early = line("early", 0.5, 0.5, guidance_scale=3.0, early_steps=4, point="early 3")
    found = Evidence(pooled([early, *world()]), "adherence", "diversity")
    assert found.cfg is not None and "early" not in {p.strategy for p in [found.cfg, *found.cfg_front]}


@pytest.mark.parametrize("teacher", [None, "Bad quality."])
def test_the_curve_of_guidance_is_that_of_one_negative_prompt(teacher):
    """The teacher's if it was sampled, else that of the first row: guidance against other words is another curve."""
    lines = [replace(one, teacher_negative_prompt=teacher) for one in world()]
    (null,) = (one for one in lines if one.name == "CFG 3")
    words = line(
        "words", 0.6, 0.2, guidance_scale=2.0, negative_prompt="Bad quality.", teacher_negative_prompt=teacher
    )
    strong = replace(null, guidance_scale=5.0, name="CFG 5", point="CFG 5")
    points = pooled([*lines, strong, words])
    curve = [point.name for point in guidance_curve(points)]
    assert curve == (["base", "words"] if teacher else ["base", "CFG 3"])
    front = [point.name for point in Evidence(points, "adherence", "diversity").cfg_front]
    assert front == (["words"] if teacher else ["CFG 3", "CFG 5"])
    without = [point for point in points if point.name != "words"]
    assert [point.name for point in guidance_curve(without)] == ["base", "CFG 3"]
    strong_words = replace(words, guidance_scale=5.0)  # the teacher's words, but at no scale of the curve
    assert [point.name for point in guidance_curve(pooled([*lines, strong, strong_words]))] == ["base", "CFG 3"]


def test_a_front_that_only_reaches_further_is_not_above():
    lines = world(quality_model=0.36)  # merged models on the straight line from (0.29, 0.36) to (0.6, 0.4)
    lines = [one for one in lines if one.strategy != "CFG"] + [
        line("CFG", 0.5, 0.3, guidance_scale=3.0, point="CFG 3"),
        line("CFG", 0.5, 0.45, guidance_scale=2.0, point="CFG 2"),
    ]  # fmt: skip
    answer = claims(pooled(lines), "adherence", "diversity")[6]
    assert answer.numbers["difference of the highest diversities"]["low"] > 0 and answer.verdict == "fails"


def test_nothing_is_reached_where_guidance_does_nothing():
    lines = world()
    of_base = {"adherence": lines[0].per_prompt["adherence"]}
    lines = [replace(one, per_prompt=one.per_prompt | of_base) if one.name == "CFG 3" else one for one in lines]
    answers = claims(pooled(lines), "adherence", "diversity")
    assert [answers[i].verdict for i in (0, 2)] == ["undecided", "undecided"]


def test_a_front_of_mixed_settings_does_not_go_through_the_base():
    hot = [line("hot CFG", 0.4, 0.4, guidance_scale=g, temperature=1.2, point=f"hot CFG {g}") for g in (2.0, 3.0)]
    fronts = fronts_of(pooled([*world(), *hot]))
    assert [p.name for p in fronts["hot CFG"]] == ["hot CFG 2.0", "hot CFG 3.0"]


def test_what_is_not_there_is_not_measured():
    points = pooled([line("base", 0.3, 0.5), line("other", 0.3, 0.5)])
    answers = claims(points, "adherence", "diversity")
    assert {claim.verdict for claim in answers} == {"not measured"}
    # Which is said once, however many pairs of metrics there are
    (table,) = claims_tables(points, ["adherence"], ["diversity", "entropy_per_token"])
    assert table.heading == UNANSWERED and len(table.rows) == 11 and table.header == ["claim"]
    tables = claims_tables(pooled(world()[:2] + world()[2:3]), ["adherence"], ["diversity"])
    assert [len(table.rows) for table in tables] == [3, 8]


def test_tables():
    points = pooled(world(bulge=0.06))
    rows = fronts_table(points, "adherence", "diversity").rows
    assert {row[0]: row[2] for row in rows}["CFG - LERP"] == "below" and len(rows) == 6
    rows = lambda_table(points, ["adherence", "diversity"]).rows
    assert rows[0][0] == "LERP, λ 0.5" and rows[0][1].startswith("0.060 [0.05")
    table = agreement_table(points, ["diversity"])
    assert table.header[1:] == ["all (10)", "at temperature 0.99 (9)"] and len(table.rows) == 1


def test_correlation_is_that_of_the_means():
    points = pooled(world())
    means = np.array([[p.values[m].mean() for m in ("diversity", "entropy_per_token")] for p in points])
    found = correlation(points, "diversity", "entropy_per_token")
    assert found["mean"] == pytest.approx(np.corrcoef(means.T)[0, 1])
    assert found["low"] <= found["mean"] <= found["high"]
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        correlation(points[:2], "diversity", "entropy_per_token")


def test_checkpoints_are_a_curve_from_the_base_and_no_trained_models():
    steps = [
        line("run", 0.3 + s / 400, 0.5 - s / 400, checkpoint=s, weights=[1.0], point=f"run {s}") for s in (40, 20)
    ]
    upper = {"mean": 0.7, "low": 0.6, "high": 0.8}
    base = replace(world()[0], metrics=world()[0].metrics | {"diversity_between_prompts": upper})
    points = pooled([*steps, base, *world()[1:]])
    fronts = {name: [p.name for p in group] for name, group in fronts_of(points).items()}
    assert fronts["run"] == ["base", "run 40", "run 20"]
    assert fronts["trained models"] == ["beta 5", "quality", "diversity"]
    adherence, diversity = training_plot(points, ["adherence", "diversity"]).axes
    guided, bound, curve = diversity.lines
    np.testing.assert_allclose(curve.get_xdata(), [0, 20, 40])
    np.testing.assert_allclose(curve.get_ydata(), [0.5, 0.45, 0.4], atol=0.02)
    assert (guided.get_label(), bound.get_label()) == ("base with guidance", "upper bound")
    assert bound.get_ydata()[0] == 0.7 and len(adherence.lines) == 2
    (axes,) = front_plot(points, y="adherence").axes
    trajectory = next(one for one in axes.lines if one.get_label() == "run")
    assert len(trajectory.get_xdata()) == 3


def test_other_sweeps_of_checkpoints_do_not_begin_at_the_base():
    """A sweep of lambda, of temperatures or with guidance at one step or several; and one checkpoint is no curve."""
    at = {"weights": [1.0], "checkpoint": 60}
    merged = [
        line("LERP", 0.4, 0.4, weights=[1 - x, x], checkpoint=60, interpolation_weight=x, point=f"LERP {x}")
        for x in (0.0, 1.0)
    ]
    cold = [line("cold", 0.3, 0.3, temperature=t, point=f"cold {t}", **at) for t in (0.7, 0.9)]
    guided = [
        line("guided", 0.3, 0.3, guidance_scale=2.0, weights=[1.0], checkpoint=s, point=f"guided {s}")
        for s in (20, 60)
    ]
    points = pooled([line("base", 0.3, 0.5), *merged, *cold, *guided, line("one", 0.3, 0.3, **at)])
    members = {name: [p.name for p in group] for name, group in fronts_of(points).items()}
    assert members == {
        "LERP": ["LERP 0.0", "LERP 1.0"], "cold": ["cold 0.7", "cold 0.9"], "guided": ["guided 20", "guided 60"],
    }  # fmt: skip
    assert training_plot(points, ["diversity"]) is None


def test_sweeps_between_models_of_one_name_are_all_counted():
    sweeps = [
        line(name, 0.4, 0.4, weights=[1 - x, x], interpolation_weight=x, model="checkpoint-60 + checkpoint-60",
             point=f"{name} {x}")
        for name in ("a", "b") for x in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    found = Evidence(pooled([line("base", 0.3, 0.5), *sweeps]), "adherence", "diversity")
    assert [point.name for point in found.lerp] == ["a 0.0", "a 0.5", "a 1.0"]
    ends = {"model": "quality + diversity"}
    two = [
        line("few", 0.4, 0.4, weights=[1 - x, x], interpolation_weight=x, point=f"few {x}", **ends) for x in (0.0, 1.0)
    ]
    again = [replace(one, name=f"{one.name} #1", training_seed=1) for one in world() if one.strategy == "LERP"]
    found = Evidence(pooled([*two, *world(), *again]), "adherence", "diversity")
    assert [point.name for point in found.lerp] == ["LERP 0.0", "LERP 0.5", "LERP 1.0"]
    assert found.pairs == found.lerp  # a training that is in both is not counted twice


def test_plots_join_sweeps():
    points = pooled(world(bulge=0.06))
    (axes,) = front_plot(points, y="adherence").axes
    assert {"base", "CFG 3", "LERP"} <= set(axes.get_legend_handles_labels()[1])
    panels = lambda_plot(points, ("adherence", "diversity")).axes
    assert len(panels) == 4
    np.testing.assert_allclose(panels[0].lines[0].get_xdata(), [0, 0.5, 1])
    assert panels[2].lines[0].get_ydata()[1] == pytest.approx(0.06, abs=1e-3)
    assert lambda_plot(points[:1]) is None
    assert training_plot(points, ["diversity"]) is None
    assert "correlation" in agreement_plot(points, ["diversity"]).axes[0].get_title()


def test_what_was_not_judged_for_one_is_left_out_for_all(caplog):
    """A model that equals the base, but for prompts on which it was not judged."""
    values = np.sort(np.random.default_rng(0).normal(size=40))
    judged = np.where(np.arange(40) < 10, np.nan, values)
    base, mine = (
        Point(strategy=n, point=n, name=n, values={"own": v[None]}) for n, v in (("base", values), ("mine", judged))
    )
    comparison = Comparison([base, mine])
    assert comparison.interval(comparison.difference(mine, base, "own")) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert comparison.means(base, "own")[0] == pytest.approx(values[10:].mean())
    assert caplog.text.count("`own` was not judged on 10 of 40 prompts") == 1
    never = Point(strategy="never", point="never", name="never", values={"own": np.full((1, 40), np.nan)})
    comparison = Comparison([base, never])
    assert comparison.means(base, "own")[0] == pytest.approx(values.mean())
    with pytest.raises(ValueError, match="bare has no values per prompt"):
        Comparison([base, Point(strategy="bare", point="bare", name="bare")])
