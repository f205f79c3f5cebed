"""`results.jsonl`: its format, and several evaluations into one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl_drcd.evaluation.results import Result, ResultsFolder, read_results

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


def test_a_row_after_a_torn_one_is_whole(tmp_path):
    """Another process died in the middle of its line, while this one was measuring."""
    folder = ResultsFolder(tmp_path)
    folder.append(row("a"))
    with open(folder.file, "a") as file:
        file.write('{"name": "b')
    folder.append(row("c"))
    assert [one.name for one in read_results(folder.file)] == ["a", "c"]
