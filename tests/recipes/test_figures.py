"""The paper's figures, from rows of an evaluation and of checkpoints."""

import pytest
from test_points import line, world

from recipes import figures
from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.results import Result, ResultsFolder


def of_training():
    steps = [line("run", 0.3, 0.5, checkpoint=step, weights=[1.0], point=f"run {step}") for step in (20, 40)]
    return [*world()[:1], *steps]


def labels(figure):
    return set(figure.axes[0].get_legend_handles_labels()[1])


def test_each_figure_shows_the_rows_that_it_is_about():
    words = line("words", 0.6, 0.2, guidance_scale=2.0, negative_prompt="Bad quality.")
    drawn = figures.draw(pooled([*world(), words]), pooled(of_training()))
    assert list(drawn) == ["1", "2", "3", "4_left", "4_right", "6", "7"]
    assert {"base", "run"} <= labels(drawn["1"]) and {"CFG 3", "words", "T 1.2"} <= labels(drawn["3"])
    assert labels(drawn["4_right"]) - {"front of all"} == {"base", "CFG 3", "LERP"}
    assert labels(drawn["6"]) - {"front of all"} == {"base", "CFG 3", "words"}


def test_the_page_names_what_is_drawn_and_what_is_missing(tmp_path, capsys):
    folder = ResultsFolder(tmp_path / "evaluation")
    for row in world():
        folder.append(row)
    figures.main(["--results", str(folder.file), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "README.md").read_text()
    shown = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert shown == {"figure_3", "figure_4_left", "figure_4_right", "figure_7"}
    assert all(f"({name}.png)" in page for name in shown) and "for want of rows: Fig. 1; Fig. 2; Fig. 6." in page
    with pytest.raises(ValueError, match=r"metric `diversity` of every row, which \['base'\]"):
        figures.draw(pooled([Result(strategy="base", point="base", name="base", per_prompt={"adherence": [0.1]})]), [])
    with pytest.raises(SystemExit):
        figures.main(["--training", "x"])
    with pytest.raises(SystemExit, match=r"nowhere.jsonl"):
        figures.main(["--results", str(tmp_path / "nowhere.jsonl")])
