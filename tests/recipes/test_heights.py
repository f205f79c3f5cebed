"""Heights above the curve of constant guidance, against hand-computed values."""

from dataclasses import replace

import pytest

from recipes import claims, hypotheses
from recipes.music import heights
from trl_drcd.evaluation.fronts import height_above
from trl_drcd.evaluation.points import Comparison, guidance_curve, pooled
from trl_drcd.evaluation.results import Result, ResultsFolder


def row(name, diversity, adherence, **settings):
    """A row whose two prompts lie around the means that are given."""
    values = {"diversity": diversity, "diversity_second": diversity + 0.2, "adherence": adherence}
    values["kl"] = 10 * (1 - adherence)
    per_prompt = {key: [value - 0.01, value + 0.01] for key, value in values.items()}
    metrics = {key: {"mean": value, "low": value, "high": value} for key, value in values.items()}
    return Result(
        strategy=name.partition(" (")[0], point=name, name=name, prompts=2, metrics=metrics, per_prompt=per_prompt,
        **settings,
    )  # fmt: skip


ROWS = [
    row("base", 0.5, 0.30),
    row("CFG (gamma 3)", 0.3, 0.40, guidance_scale=3.0),
    row("CFG (gamma 1.5)", 0.4, 0.36, guidance_scale=1.5),
    row("CFG (gamma 7)", 0.35, 0.20, guidance_scale=7.0),  # beyond the teacher's
    row("late (early 20)", 0.45, 0.35, guidance_scale=3.0, early_steps=20),
    row("late (early 40)", 0.6, 0.31, guidance_scale=3.0, early_steps=40),
    row("trained", 0.2, 0.41, weights=(1.0,)),
    row("cold", 0.4, 0.30, temperature=0.7),
]


@pytest.mark.parametrize(
    ("name", "height"),
    [
        ("late (early 20)", 0.35 - 0.33),  # half way between gamma 1.5 and the base
        ("late (early 40)", 0.31 - 0.30),  # more diverse than the base: the curve ends there
        ("trained", 0.41 - 0.40),  # less diverse than with gamma 3
        ("cold", 0.30 - 0.36),
    ],
)
def test_a_height_is_the_distance_to_the_curve_at_the_same_diversity(name, height):
    points = pooled(ROWS)
    curve = guidance_curve(points)
    assert [point.name for point in curve] == ["base", "CFG (gamma 3)", "CFG (gamma 1.5)"]
    (point,) = (point for point in points if point.name == name)
    for diversity in heights.DIVERSITIES:
        ours, theirs = (Comparison(points).curve(group, diversity, "adherence") for group in ([point], curve))
        assert height_above(ours[0], theirs)[0] == pytest.approx(height)


def test_the_table_has_means_of_strategies_and_differences(tmp_path, capsys):
    folder = ResultsFolder(tmp_path)
    for result in ROWS:
        folder.append(result)
    file = str(tmp_path / "results.jsonl")
    heights.main([file, "--differences", "late (early 20)", "cold"])
    table = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " 0.015 [" in table["| late, mean"] and " 0.080 [" in table["| late (early 20) - cold"]
    cells = [cell.split(" [")[0] for cell in table["| late (early 20) - cold"].split(" | ")[1:4]]
    assert cells == ["0.050", "0.050", "0.050"]  # 0.45 - 0.4, the same, 0.35 - 0.3
    assert "| base" not in table and "| CFG (gamma 7)" in table
    with pytest.raises(SystemExit, match=r"has no \['warm'\]; it has \['base'"):
        heights.main([file, "--differences", "warm", "cold"])
    (tmp_path / "results.jsonl").write_text((tmp_path / "results.jsonl").read_text().splitlines()[0])
    with pytest.raises(SystemExit, match="needs rows of the base with two guidance scales, got 1"):
        heights.main([file])


def test_what_was_not_measured_is_left_out_or_named(tmp_path, capsys):
    """An evaluation without a second embedder, and a metric that there is not."""
    folder = ResultsFolder(tmp_path)
    for result in ROWS:
        metrics, values = (
            {key: value for key, value in part.items() if key != "diversity_second"}
            for part in (result.metrics, result.per_prompt)
        )
        folder.append(replace(result, metrics=metrics, per_prompt=values))
    heights.main([str(folder.file)])
    header = capsys.readouterr().out.splitlines()[0]
    assert "height" in header and "not rewarded" not in header
    with pytest.raises(SystemExit, match=r"`adherance` was not measured for all rows; they have \['adherence'"):
        heights.main([str(folder.file), "--metric", "adherance"])
    with pytest.raises(SystemExit, match=r"`diversity_second` was not measured for all rows"):
        hypotheses.main([str(folder.file)])
    folder.file.write_text("")
    for script in (heights, hypotheses, claims):
        with pytest.raises(SystemExit, match=r"results\.jsonl has no rows"):
            script.main([str(folder.file)])


def test_of_a_metric_of_which_less_is_better_less_is_above(tmp_path, capsys):
    folder = ResultsFolder(tmp_path)
    for result in ROWS:
        folder.append(result)
    heights.main([str(tmp_path / "results.jsonl"), "--metric", "kl"])
    table = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " 0.150 [" in table["| late, mean"] and " -0.600 [" in table["| cold"]
