"""`results.jsonl`: its format, and several evaluations into one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.results import Result, ResultsFolder, joined, read_results

RESULTS = Path(__file__).parents[1] / "results"
FILES = ["music", "text", "music/all_weights", "music/demo", "music/training"]


def row(name: str, settings: str = "", **changed) -> Result:
    given = {"strategy": name, "point": name, "name": name, "settings": settings or f"s{name}"} | changed
    return Result(**given, metrics={"kl": {"mean": 1.0, "low": 0.5, "high": 1.5}}, per_prompt={"kl": [1.0]})


@pytest.mark.parametrize("folder", FILES)
def test_a_line_is_read_and_written_to_the_letter(folder):
    text = (RESULTS / folder / "results.jsonl").read_text()
    rows = read_results(RESULTS / folder / "results.jsonl")
    assert "".join(json.dumps(one.to_json()) + "\n" for one in rows) == text


def test_what_a_line_lacks_has_its_default_and_what_it_has_more_is_kept():
    line = {"name": "CFG", "guidance_scale": 3, "metrics": {}, "per_prompt": {}, "of a later version": [1]}
    read = Result.from_json(line)
    assert (read.strategy, read.point, read.passes_per_token, read.weights) == ("CFG", "CFG", 2, ())
    assert read.to_json()["of a later version"] == [1] and "omega" not in read.to_json()
    assert Result.from_json(read.to_json()) == read
    for broken in ({"metrics": {}, "per_prompt": {}}, {"name": "a", "metrics": []}, {}):
        with pytest.raises(ValueError, match="not a result"):
            Result.from_json(broken)


def test_a_torn_last_line_is_taken_off_and_another_is_refused(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.append(row("a"))
    with open(folder.file, "a") as file:
        file.write('{"name": "b')  # as after a crash
    assert list(folder.read()) == ["sa"] and folder.file.read_text().count("\n") == 1
    folder.append(row("b"))
    with open(folder.file, "a") as file:
        file.write('{"x": 1}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 3 is not a result of an evaluation; remove that line"):
        folder.read()


def test_no_line_is_doubled_and_none_is_lost(tmp_path):
    folder = ResultsFolder(tmp_path)
    for name in "abc":
        folder.append(row(name))
    folder.arrange([row("a")])
    folder.arrange([row("b")])
    folder.arrange([row("b")])
    names = [one.name for one in read_results(folder.file)], [one.name for one in read_results(folder.others)]
    assert names == (["b"], ["c", "a"])
    folder.arrange([row("a"), row("b"), row("c")])  # all asked for: nothing is left over
    assert [one.name for one in read_results(folder.file)] == ["a", "b", "c"] and folder.others.read_text() == ""
    # Two names of the same samples are two lines
    folder.arrange([row("lambda 0", "sa"), row("b")])
    folder.arrange([row("b")])
    assert [one.name for one in read_results(folder.others)] == ["c", "lambda 0"]


WRITER = """
import sys, time
from dataclasses import replace
from trl_drcd.evaluation.results import Result, ResultsFolder
folder, mine = ResultsFolder(sys.argv[1]), []
for number in range(40):
    name = f"{sys.argv[2]}{number}"
    mine.append(Result(strategy=name, point=name, name=name, settings=name, metrics={}, per_prompt={"x": [0.5] * 200}))
    folder.append(mine[-1])
    if number % 10 == 9:
        folder.arrange(mine)
"""


def test_two_evaluations_into_one_folder_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = [one.name for name in ("results", "other_results") for one in read_results(tmp_path / f"{name}.jsonl")]
    assert sorted(found) == sorted(f"{name}{number}" for name in "ab" for number in range(40))


def test_temporary_files_of_the_dead_are_removed_and_of_the_living_are_kept(tmp_path):
    samples = tmp_path / "samples" / "base_1"
    samples.mkdir(parents=True)
    dead = [folder / f".x.wav.{'0' * 16}.tmp" for folder in (tmp_path, samples.parent, samples)]
    young = tmp_path / f".x.wav.{'1' * 16}.tmp"  # somebody may still be writing it
    for file in (*dead, young):
        file.touch()
    for file in dead:
        os.utime(file, (0, 0))
    ResultsFolder(tmp_path).check_room(1)
    assert young.exists() and not any(file.exists() for file in dead)


def test_no_room_is_found_before_sampling_and_says_what_to_do(tmp_path, monkeypatch):
    folder = ResultsFolder(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3 * 2**20))
    folder.check_room(3)
    with (
        pytest.raises(
            OSError, match=r"`output_dir=.*` cannot be written to \(3 MiB are free, .*\): free some disk space"
        ),
        folder.explaining(),
    ):
        folder.check_room(4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_what_to_do(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.file.symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"No space left on device.*free some disk space and run this again"),
        folder.explaining(),
    ):
        folder.append(row("a"))


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), ResultsFolder(tmp_path).explaining():
        (tmp_path / "elsewhere").read_text()


def drawn(name: str, seed: int, kl: list[float], point: str | None = None, **settings) -> Result:
    metrics = {key: {"mean": 9.0, "low": 9.0, "high": 9.0} for key in ("kl", "frechet")}
    if "omega" in settings:
        metrics["quality"] = metrics["kl"]
    return Result(
        strategy=name, point=point or name, name=name, seed=seed, prompts=len(kl), samples_per_prompt=8,
        metrics=metrics,
        per_prompt={"kl": kl, "quality": kl}, **settings,
    )  # fmt: skip


def written(file: Path, *rows: Result) -> Path:
    file.write_text("".join(json.dumps(one.to_json()) + "\n" for one in rows))
    return file


def test_further_samples_are_joined_prompt_by_prompt(tmp_path):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0, 6.0]), drawn("CFG", 0, [5.0, 5.0, 5.0]))
    second = written(tmp_path / "1", drawn("base", 1, [2.0, 4.0, float("nan")]))
    third = written(tmp_path / "2", drawn("base", 2, [3.0, 9.0, 8.0]))
    base, guided = read_results(first, second, third)
    assert base.per_prompt == {"kl": [2.0, 5.0, 7.0], "quality": [2.0, 5.0, 7.0]}  # without the one that is missing
    assert base.samples_per_prompt == 24 and guided == drawn("CFG", 0, [5.0, 5.0, 5.0])
    assert base.metrics["frechet"]["mean"] == 9.0  # it has no values per prompt, and is that of the first
    assert base.metrics["kl"]["mean"] == pytest.approx(14 / 3) and base.metrics["kl"]["low"] < 14 / 3


def test_further_trainings_are_rows_of_the_same_point(tmp_path):
    trainings = [
        drawn(f"mine #{n}", 0, [float(n), 2.0], "mine", training_seed=n, model=f"outputs/{n}") for n in range(4)
    ]
    first = written(tmp_path / "0", trainings[0], trainings[1], drawn("base", 0, [1.0, 1.0]))
    later = written(tmp_path / "1", trainings[2], trainings[3])
    rows = read_results(first, later)
    assert [row.name for row in rows] == ["mine #0", "mine #1", "base", "mine #2", "mine #3"]
    mine, base = pooled(rows)
    assert (mine.runs, base.runs) == (4, 1) and mine.values["kl"].tolist() == [[n, 2.0] for n in range(4)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"temperature": 0.5}, "further trainings must have the same `temperature`, got 0.99 and 0.5"),
        ({"diversity_coef": 100.0}, "further trainings must have the same `diversity_coef`, got 200.0 and 100.0"),
        (
            {"but_model": "of others"},
            "mine #2 in .* must have .*of mine #0, .*`but_model` .*these, of others",
        ),
        ({"model_digest": "a"}, "mine #2 is the model of mine #0 once more"),
        ({"model_digest": None, "model": "outputs/0"}, "mine #2 is the model of mine #0 once more"),
        ({"training_seed": None}, "mine #2 is of the point of mine #0, but one of them has no number"),
    ],
)
def test_what_is_no_further_training_of_a_point(tmp_path, other, message):
    same = {"diversity_coef": 200.0, "but_model": "these", "point": "mine"}
    one = drawn("mine #0", 0, [1.0, 2.0], **same, training_seed=0, model="outputs/0", model_digest="a")
    two = {"training_seed": 2, "model": "outputs/2", "model_digest": "b"}
    first = written(tmp_path / "0", one, drawn("base", 0, [1.0, 1.0]))
    second = written(tmp_path / "1", drawn("mine #2", 0, [1.0, 2.0], **(same | two | other)))
    with pytest.raises(ValueError, match=message):
        read_results(first, second)


def test_further_trainings_of_an_earlier_version_or_another_omega(tmp_path, caplog):
    same = {"point": "mine", "but_model": "these"}
    first = written(tmp_path / "0", drawn("mine #0", 0, [1.0, 2.0], **same, training_seed=0, model="0", omega=5.0))
    second = written(tmp_path / "1", drawn("mine #1", 0, [3.0, 4.0], **same, training_seed=1, model="1", omega=9.0))
    (mine,) = pooled(read_results(first, second))
    assert mine.values.keys() == {"kl"} and "quality" not in mine.metrics and not caplog.text
    written(second, drawn("mine #1", 0, [3.0, 4.0], "mine", training_seed=1, model="1", omega=5.0))
    (mine,) = pooled(read_results(first, second))
    assert mine.values.keys() == {"kl", "quality"} and "do not tell whether their prompts" in caplog.text


def test_joined_rows_have_the_values_of_all_their_samples_together():
    """For means over samples; the noise of two independent halves is smaller by the root of two."""
    values = np.random.default_rng(0).normal(size=(16, 400))
    halves = [drawn("base", seed, list(half.mean(0))) for seed, half in enumerate(values.reshape(2, 8, 400))]
    together = joined(halves)
    assert together.per_prompt["kl"] == pytest.approx(values.mean(0), rel=1e-4, abs=1e-5)
    widths = [np.std(one.per_prompt["kl"]) for one in (together, halves[0])]
    assert widths[0] / widths[1] == pytest.approx(2**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 0}, r"another `seed`, got \[0, 0\]"),
        ({"temperature": 0.5}, r"base: .* the same `temperature`, got 0.99 and 0.5"),
        ({"kl": [1.0, 2.0]}, "the same `prompts`, got 3 and 2"),
        ({"teacher_guidance_scale": 5.0}, "the same `teacher_guidance_scale`"),
        ({"name": "base #1", "point": "base", "training_seed": 1}, "base #1 is of the point of base, but one"),
        ({"but_seed": "of other prompts"}, r"the same prompts, model, judges and lengths, .*'these', 'of other"),
    ],
)
def test_what_is_no_further_sample_of_a_row(tmp_path, other, message):
    same = {"kl": [1.0, 2.0, 3.0], "but_seed": "these"}
    first = written(tmp_path / "0", drawn("base", 0, **same))
    second = written(tmp_path / "1", drawn(**({"name": "base", "seed": 1} | same | other)))
    with pytest.raises(ValueError, match=message):
        read_results(first, second)


def test_rows_of_another_evaluation_stand_beside_the_first(tmp_path, caplog):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0], but_row="these", omega=5.0))
    rows = [
        drawn("CFG", 0, [0.0, 1.0], but_row="these", omega=5.0),
        drawn("hot", 0, [3.0, 1.0], but_row="these", omega=9.0),
    ]
    base, cfg, hot = read_results(first, written(tmp_path / "1", rows[0]), written(tmp_path / "2", rows[1]))
    assert [one.name for one in (base, cfg, hot)] == ["base", "CFG", "hot"] and not caplog.text
    assert "quality" in cfg.per_prompt and "quality" not in hot.per_prompt  # of other weights
    written(tmp_path / "2", drawn("hot", 0, [3.0, 1.0]))
    assert len(read_results(first, tmp_path / "2")) == 2 and "do not tell whether their prompts" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"but_row": "of others"}, "CFG in .*1 must have .* of base, .* digests `but_row` differ: these, of others"),
        ({"kl": [1.0]}, "base: CFG in .*1 must have the same `prompts`, got 2 and 1"),
        ({"teacher_guidance_scale": 5.0}, "the same `teacher_guidance_scale`, got 3.0 and 5.0"),
        ({"kind": "music"}, "the same `kind`"),
    ],
)
def test_rows_that_cannot_be_compared_with_the_first(tmp_path, other, message):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0], but_row="these"))
    second = written(
        tmp_path / "1", drawn(**({"name": "CFG", "seed": 0, "kl": [1.0, 2.0], "but_row": "these"} | other))
    )
    with pytest.raises(ValueError, match=message):
        read_results(first, second)


def test_another_omega_is_another_quality():
    rows = [drawn("base", seed, [1.0, 2.0], omega=float(seed)) for seed in range(2)]
    assert joined(rows).per_prompt.keys() == {"kl"}


def test_of_rows_that_do_not_say_what_they_are_samples_of_a_warning_tells(tmp_path, caplog):
    rows = [drawn("base", seed, [1.0, 2.0], but_seed="these" if seed else None) for seed in range(2)]
    assert joined(rows).per_prompt["kl"] == [1.0, 2.0] and "do not tell whether their prompts" in caplog.text


def test_two_rows_of_one_name_have_no_further_samples(tmp_path):
    first = written(tmp_path / "0", drawn("base", 0, [1.0]), drawn("base", 0, [2.0], temperature=0.5))
    second = written(tmp_path / "1", drawn("CFG", 1, [1.0]))
    assert len(read_results(first)) == 2
    with pytest.raises(ValueError, match="has two rows base"):
        read_results(first, second)
