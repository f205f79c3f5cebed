"""The paper's figures, from rows of an evaluation and of checkpoints."""

from dataclasses import replace

import pytest
from test_points import line, world

from recipes import figures
from trl_drcd.evaluation.joining import read_joined
from trl_drcd.evaluation.points import pooled, training_sweeps
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
    figures.main(["--results", str(folder.folder), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "README.md").read_text()
    shown = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert shown == {"figure_3", "figure_4_left", "figure_4_right", "figure_7"}
    assert (
        all(f"({name}.png)" in page for name in shown) and "want of rows or metrics: Fig. 1; Fig. 2; Fig. 6." in page
    )
    assert figures.draw(pooled([Result(strategy="a", point="a", name="a", per_prompt={"adherence": [0.1]})]), []) == {}
    without = [
        replace(row, per_prompt={k: v for k, v in row.per_prompt.items() if "entropy" not in k}) for row in world()
    ]
    assert "7" not in figures.draw(pooled(without), [])
    with pytest.raises(SystemExit):
        figures.main(["--training", "x"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit, match=r"empty.jsonl has no rows"):
        figures.main(["--results", str(tmp_path / "empty.jsonl")])
    with pytest.raises(SystemExit, match=r"nowhere.jsonl"):
        figures.main(["--results", str(tmp_path / "nowhere.jsonl")])


def test_what_is_drawn_of_this_repository_is_there():
    for results, training in figures.OURS.values():
        assert pooled(read_joined(*(figures.ROOT / one for one in results)))
        rows = read_joined(*(figures.ROOT / one for one in training)) if training else []
        assert not training or training_sweeps(pooled(rows))
