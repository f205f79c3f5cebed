"""The hypotheses of the studies, against hand-computed values."""

from dataclasses import replace

import numpy as np
import pytest

from recipes import hypotheses
from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.results import Result, ResultsFolder

PROMPTS = np.linspace(-0.01, 0.01, 40)


def row(name, diversity, adherence, point=None, **settings):
    """A row whose prompts lie around the given means, the diversity that is not rewarded 0.2 above the other."""
    values = {"diversity": diversity, "diversity_second": diversity + 0.2, "adherence": adherence}
    per_prompt = {key: list(value + PROMPTS) for key, value in values.items()}
    point = point or name
    return Result(
        strategy=point.partition(" (")[0], point=point, name=name, prompts=len(PROMPTS), per_prompt=per_prompt,
        metrics={key: {"mean": value, "low": value, "high": value} for key, value in values.items()}, **settings,
    )  # fmt: skip


def results(lift=0.02, seeds=(-0.001, 0.0, 0.001)):
    """Merges of three trainings that lie `lift`, and a little per seed, above a straight curve of guidance."""
    rows = [row("base", 0.5, 0.30)]
    rows += [row(f"CFG (gamma {g})", d, 0.4 - (d - 0.3) / 2, guidance_scale=g) for g, d in ((3.0, 0.3), (1.5, 0.4))]
    for i, seed in enumerate(seeds):
        for weight, diversity in ((0.0, 0.3), (0.5, 0.4), (1.0, 0.6)):
            height, name = 0.4 - (diversity - 0.3) / 2 + lift + seed, f"LERP (lambda {weight:g})"
            rows.append(
                row(f"{name} #{i}", diversity, height, name, interpolation_weight=weight,
                    weights=(1 - weight, weight), training_seed=i)
            )  # fmt: skip
        rows.append(row(f"quality #{i}", 0.3, 0.40 + seed, "quality", weights=(1.0,), training_seed=i))
    rows.append(row("between", 0.4, 0.36, weights=(1.0,)))
    rows.append(row("between at 200", 0.5, 0.29, weights=(1.0,)))
    rows += [row(f"heated quality (T {t:g})", d, 0.36, temperature=t) for t, d in ((1.2, 0.4), (1.4, 0.5))]
    rows.append(row("soup of quality", 0.3, 0.41, weights=(0.3, 0.3, 0.4)))
    return rows


@pytest.mark.parametrize("diversity", hypotheses.DIVERSITIES)
@pytest.mark.parametrize("soup", ["soup of quality", "mean of quality"])
def test_each_statistic_is_the_distance_that_its_name_says(diversity, soup):
    rows = results()
    rows[-1] = replace(rows[-1], name=soup, point=soup, strategy=soup)
    study = hypotheses.Study(pooled(rows), diversity)
    h1, h2, h3, h4, h5, h6 = (float(value[0]) for value in study.statistics().values())
    # The merges' curve at the base's diversity of 0.5, half way between lambda 0.5 and 1: 0.4 - 0.1 + 0.02
    assert h1 == pytest.approx(0.32 - 0.30)
    assert h2 == pytest.approx(0.02)  # lambda 0.5 alone is between the ends
    assert h3 == pytest.approx((0.37 - 0.36 + 0.32 - 0.29) / 2 + hypotheses.MARGIN)  # each at its own diversity
    assert h4 == pytest.approx(0.01)
    assert h5 == pytest.approx((0.36 - 0.35 + 0.36 - 0.30) / 2)  # its temperatures', each at its own diversity
    assert h6 == pytest.approx((0.37 - 0.36 + 0.32 - 0.36) / 2)


def test_merges_that_are_less_diverse_than_the_base_are_compared_where_the_most_diverse_one_is():
    rows = [row for row in results() if "lambda 1" not in row.name]  # the most diverse one has 0.4
    h1 = hypotheses.Study(pooled(rows), "diversity").statistics()[hypotheses.MAIN[0]]
    assert float(h1[0]) == pytest.approx(0.37 - 0.35)  # of the merges, and of guidance


def test_one_training_alone_is_tested_with_intervals_over_prompts(tmp_path, capsys):
    folder = ResultsFolder(tmp_path)
    for one in results(seeds=(0.0, 0.02)):
        folder.append(one)
    hypotheses.main([str(folder.file), "--training_seed", "1"])
    assert f"| {hypotheses.MAIN[0]} | 0.040 [" in capsys.readouterr().out  # its own lift, not the mean of both
    with pytest.raises(SystemExit, match=r"training_seed=2.*\[0, 1\]"):
        hypotheses.main([str(folder.file), "--training_seed", "2"])


@pytest.mark.parametrize(
    ("low_1", "low_2", "expected"),
    [
        # Lower ends at 95 % and 97.5 % of both: the second is enough at 95 % once the first is above 0 at 97.5 %
        ({0.95: 0.02, 0.975: 0.01}, {0.95: 0.01, 0.975: -0.01}, (True, True)),
        ({0.95: 0.02, 0.975: -0.01}, {0.95: 0.01, 0.975: -0.01}, (False, False)),
        ({0.95: 0.02, 0.975: 0.01}, {0.95: -0.01, 0.975: -0.02}, (True, False)),
    ],
)
def test_holm_asks_more_of_the_first(monkeypatch, low_1, low_2, expected):
    study = hypotheses.Study(pooled(results()), "diversity")
    lows = {1.0: low_1, 2.0: low_2}
    monkeypatch.setattr(
        type(study.resampling), "interval", lambda self, statistic, level: {"low": lows[float(statistic[0])][level]}
    )
    given = {"a": np.array([1.0]), "b": np.array([2.0])}
    assert tuple(hypotheses.holm(study, given, ("a", "b")).values()) == expected


@pytest.mark.parametrize(
    ("rewarded", "other", "significant", "expected"),
    [
        ((0.01, 0.02), 0.01, True, "holds"),
        ((0.01, 0.02), -0.01, True, "undecided: the other diversity disagrees"),
        ((0.01, 0.02), 0.01, False, "undecided"),  # at 95 %, not by Holm
        ((-0.02, -0.01), -0.01, False, "fails"),
    ],
)
def test_a_verdict_needs_both_diversities(rewarded, other, significant, expected):
    low, high = rewarded
    ours = {"mean": (low + high) / 2, "low": low, "high": high}
    assert hypotheses.verdict(ours, {"mean": other, "low": other, "high": other}, significant) == expected


def test_the_table_has_a_line_per_hypothesis(tmp_path, capsys):
    folder = ResultsFolder(tmp_path)
    for result in results():
        folder.append(result)
    file = tmp_path / "results.jsonl"
    hypotheses.main([str(file)])
    out = capsys.readouterr().out
    table = {line.split(" | ")[0]: line for line in out.splitlines()}
    assert table["| H2: mean height of merges"].startswith("| H2: mean height of merges | 0.020 [0.01")
    assert table["| H2: mean height of merges"].endswith("| holds |") and "H3" in out and "H4" in out
    assert "Diversity of the base 0.500; of the most diverse merge 0.600." in out
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if "LERP" not in line))
    with pytest.raises(SystemExit, match="need a sweep of lambda called `LERP`"):
        hypotheses.main([str(file)])


def test_further_samples_of_guidance_count_and_a_blinded_look_tells_no_value(tmp_path, capsys):
    files = []
    for seed, shift in enumerate((0.0, 0.02)):
        folder = ResultsFolder(tmp_path / str(seed))
        files.append(str(folder.file))
        for one in results(seeds=(0.0, 0.01)):
            if seed == 0 or one.name.startswith(("base", "CFG")):
                adherence = [value + shift for value in one.per_prompt["adherence"]]
                folder.append(replace(one, seed=seed, per_prompt=one.per_prompt | {"adherence": adherence}))
    hypotheses.main(files)
    assert f"| {hypotheses.MAIN[1]} | 0.015 [" in capsys.readouterr().out  # 0.025, and guidance is 0.01 higher
    hypotheses.main([*files, "--blinded"])
    said = capsys.readouterr().out
    assert said.count("±") == 2 * said.count("| H") and "0.015" not in said and "holds" not in said
