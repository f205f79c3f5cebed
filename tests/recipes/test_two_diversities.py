"""The contrast of two diversity models, against hand-computed values."""

import pytest

from recipes.music import two_diversities
from trl_drcd.evaluation.results import Result, ResultsFolder


def row(name, timbre, harmony, adherence=(0.3, 0.3, 0.3)):
    values = {"diversity": timbre, "diversity_second": harmony, "adherence": list(adherence)}
    return Result(strategy=name, point=name, name=name, per_prompt=values)


def test_the_contrast_is_the_difference_of_the_differences():
    one, other = (
        row("timbre", [0.5, 0.7, 0.6], [0.3, 0.2, 0.4], (0.1, 0.2, 0.3)),
        row("harmony", [0.4, 0.5, 0.3], [0.5, 0.3, 0.3]),
    )
    found = two_diversities.contrasts(one, other)
    assert found["diversity of timbre"]["mean"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert found["diversity of harmony"]["mean"] == pytest.approx((-0.2 - 0.1 + 0.1) / 3)
    assert found["adherence"]["mean"] == pytest.approx(-0.1)
    # Of 0.3, 0.3, 0.2: standard error 1/30, and t of 2 degrees of freedom 4.3027
    expected = {"mean": 0.8 / 3, "low": 0.8 / 3 - 4.3027 / 30, "high": 0.8 / 3 + 4.3027 / 30}
    assert found["difference"] == pytest.approx(expected, abs=1e-4)


def test_the_figure_has_a_point_per_row_and_the_lines_of_the_merges():
    rows = {name: row(name, [0.5, 0.7, 0.6], [0.3, 0.2, 0.4]) for name in ("timbre", "harmony", "base")}
    rows["quality"] = row("quality", [0.1, 0.2, 0.3], [0.3, 0.5, 0.7])
    (axes,) = two_diversities.draw(rows).axes
    assert {text.get_text() for text in axes.texts} == set(rows)
    (at,) = (text.xy for text in axes.texts if text.get_text() == "quality")
    assert list(at) == pytest.approx([0.2, 0.5])
    # From quality to timbre, since the row of their merge is missing
    assert axes.lines[0].get_xydata().ravel() == pytest.approx([0.2, 0.5, 0.6, 0.3])


def test_results_without_the_rows_are_refused(tmp_path):
    ResultsFolder(tmp_path).append(row("timbre", [0.5], [0.3]))
    with pytest.raises(SystemExit, match=r"lacks the rows base, half harmony .*half timbre .*harmony; it has timbre"):
        two_diversities.main([str(tmp_path / "results.jsonl")])
