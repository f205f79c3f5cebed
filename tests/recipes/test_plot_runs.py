"""The plot of training runs: what it takes from a log and from judged checkpoints."""

import json

import numpy as np
import pytest

from recipes import plot_runs
from trl_drcd.evaluation.results import Result

LOG = [{"step": 4, "kl": 20.0, "diversity": 0.4, "entropy": 1.2}, {"step": 8, "kl": 10.0, "diversity": 0.3}]


def line(name, adherence):
    metrics = {metric: {"mean": 1.0} for metric in plot_runs.JUDGED.values()} | {"adherence": {"mean": adherence}}
    return Result.from_json({"name": name, "metrics": metrics, "per_prompt": {}})


def test_rows_of_a_run_are_its_checkpoints():
    results = [line("base", 0.1), line("run 40", 0.2), line("run 80", 0.3), line("other run 40", 0.4)]
    entries = plot_runs.judged_entries(results, "run")
    assert [(entry["step"], entry["eval_adherence"]) for entry in entries] == [(40, 0.2), (80, 0.3)]
    assert [entry["eval_adherence"] for entry in plot_runs.judged_entries(results, "other run")] == [0.4]


def test_the_running_mean_has_fewer_values_at_the_ends():
    np.testing.assert_allclose(plot_runs.smoothed([1.0, 2.0, 6.0, 3.0], 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(plot_runs.smoothed([1.0, 2.0], 1), [1.0, 2.0])


def test_means_over_the_last_steps_are_of_the_runs_of_a_setting(tmp_path, monkeypatch, capsys):
    other = [{"step": 4, "kl": 1.0, "diversity": 0.5}, {"step": 8, "kl": 14.0, "diversity": 0.4}]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for name, log in {"a/beta_s0": LOG, "b/beta_s0": LOG, "b/beta_s1": other}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    files = [str(file) for file in sorted(tmp_path.glob("*/*.jsonl"))]
    monkeypatch.setattr("sys.argv", ["plot_runs.py", *files, "--last", "4", "--output", str(tmp_path / "c.png")])
    plot_runs.main()
    printed = capsys.readouterr().out
    assert "| a/beta | 1 | 10 (10 to 10) | 0.3 (0.3 to 0.3) |" in printed
    assert "| b/beta | 2 | 12 (10 to 14) | 0.35 (0.3 to 0.4) |" in printed


def test_runs_of_one_kind_are_one_line_in_a_band():
    other = [{"step": 4, "kl": 10.0, "diversity": 0.6}, {"step": 6, "kl": 5.0}, {"step": 8, "kl": 4.0}]
    kinds = plot_runs.by_seed({"beta_s0": LOG, "beta_s1": other, "alone": LOG})
    assert {kind: len(logs) for kind, logs in kinds.items()} == {"beta": 2, "alone": 1}
    kl, diversity, _, path = plot_runs.draw_seeds(kinds).axes
    assert [line.get_label() for line in kl.lines] == ["beta (2)", "alone (1)"]
    assert list(kl.lines[0].get_xdata()) == [4, 8] and list(kl.lines[0].get_ydata()) == [15.0, 7.0]
    assert list(diversity.lines[0].get_xdata()) == [4]  # the only step that both have
    assert list(path.lines[0].get_xdata()) == [15.0] and list(path.lines[0].get_ydata()) == [0.5]
    lowest_to_highest = kl.collections[0].get_paths()[0].vertices[:, 1]
    assert lowest_to_highest.min() == 4.0 and lowest_to_highest.max() == 20.0
    assert list(path.lines[-2].get_xdata()) == [20.0, 10.0]  # of the run that is alone


def test_only_what_was_measured_is_drawn(tmp_path, monkeypatch, capsys):
    run, results = tmp_path / "run", tmp_path / "results.jsonl"
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    figure = plot_runs.draw({"run": LOG, "other": plot_runs.judged_entries([line("other 8", 0.3)], "other")})
    assert [axes.get_title().split("\n")[0] for axes in figure.axes][-1] == "text adherence"
    assert len(plot_runs.draw({"run": LOG}).axes) == 3
    curve, dots = figure.axes[0].lines
    assert list(curve.get_ydata()) == [20.0, 10.0] and list(dots.get_xdata()) == [8]
    results.write_text(json.dumps(line("run 8", 0.3).to_json()) + "\n")
    file = tmp_path / "plots" / "curves.png"
    monkeypatch.setattr("sys.argv", ["plot_runs.py", str(run), "--judged", str(results), "--output", str(file)])
    plot_runs.main()
    assert file.stat().st_size > 10_000 and str(file) in capsys.readouterr().out
    results.write_text(json.dumps(line("other 8", 0.3).to_json()) + "\n")
    for words, message in (
        ([str(tmp_path)], "no log.jsonl in"),
        ([str(run), str(run)], "folders of the same name"),
        ([str(run), "--judged", str(results)], "has no row for run; rows are named `run STEP`"),
        ([str(run), "--smooth", "0"], "--smooth must be at least 1, got 0"),
        ([str(run), "--seeds", "--judged", str(results)], "--judged has a row for each run; leave out --seeds"),
        ([str(run), "--last", "0"], "--last must be at least 1, got 0"),
    ):
        monkeypatch.setattr("sys.argv", ["plot_runs.py", *words])
        with pytest.raises(SystemExit):
            plot_runs.main()
        assert message in capsys.readouterr().err
