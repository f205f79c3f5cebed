"""Ratings are stored once and for good: with real processes, killed and competing."""

import signal
import subprocess
import sys

import pytest

from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.simulated import SimulateArguments, simulate
from trl_drcd.ratings.store import FILE, Answer, Study, _rename_new
from trl_drcd.ratings.study import create_study

# Rates as fast as it can, and says so after each rating that is on the disk
RATER = """
import sys
from trl_drcd.ratings.store import Answer, Study
study, name = Study(sys.argv[1]), sys.argv[2]
link = name.removeprefix("link:") if name.startswith("link:") else study.join(name)
print("link", link, flush=True)
while task := study.next_task(link):
    for place in task.places:
        study.mark_played(link, task.slot, place)
    answer = Answer(4, 2) if task.question == "quality" else Answer(preference=5)
    study.rate(link, task.slot, answer)
    print("rated", task.slot, flush=True)
"""


def start(study, name, environment):
    return subprocess.Popen(
        [sys.executable, "-c", RATER, str(study.folder), name], stdout=subprocess.PIPE, text=True, env=environment
    )


def rate_next(study, link):
    task = study.next_task(link)
    for place in task.places:
        study.mark_played(link, task.slot, place)
    return task.slot, study.rate(link, task.slot, Answer(3, 3) if task.question == "quality" else Answer(preference=3))


def test_kill_9_loses_nothing_that_was_acknowledged(study, environment):
    process = start(study, "ann", environment)
    link = process.stdout.readline().split()[1]
    acknowledged = [int(process.stdout.readline().split()[1]) for _ in range(7)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [
        int(line.split()[1]) for line in process.stdout if line.startswith("rated") and line.endswith("\n")
    ]
    process.wait()
    stored = [rating["slot"] for rating in Study(study.folder).ratings()]
    assert set(acknowledged) <= set(stored) and len(stored) == len(set(stored)) <= len(acknowledged) + 1
    assert study.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    # the same link goes on where it ended, and every item is rated once
    done, all_ = study.progress(link)
    assert done == len(stored) < all_
    while study.next_task(link):
        assert rate_next(study, link)[1]
    assert study.progress(link) == (all_, all_)
    assert len({rating["item"] for rating in study.ratings()}) == len(study.ratings()) == all_


def test_raters_at_once_share_nothing_and_lose_nothing(study, environment):
    processes = [start(study, f"rater {number}", environment) for number in range(6)]
    assert [process.wait(timeout=300) for process in processes] == [0] * 6
    (slots,) = study.rows("SELECT count(*) AS n FROM slots")
    ratings = study.ratings()
    assert len(ratings) == slots["n"]  # every slot once
    assert len({(rating["pseudonym"], rating["item"]) for rating in ratings}) == len(ratings)
    assert len({row["book"] for row in study.rows("SELECT book FROM raters")}) == 6


def test_one_link_in_two_processes(study, environment):
    """Two windows of one rater: the second answer to an item changes nothing."""
    link = study.join("ann")
    windows = [start(study, f"link:{link}", environment) for _ in range(2)]
    said = [window.communicate(timeout=300)[0].count("rated") for window in windows]
    done, all_ = study.progress(link)
    assert done == all_ == len(study.ratings()) <= sum(said)
    assert [window.returncode for window in windows] == [0, 0]


def test_a_double_click_counts_once(study):
    link = study.join("ann")
    task = study.next_task(link)
    for place in task.places:
        study.mark_played(link, task.slot, place)
    assert study.rate(link, task.slot, Answer(5, 1))
    assert not study.rate(link, task.slot, Answer(1, 5))
    (rating,) = study.ratings()
    assert (rating["score_left"], rating["score_right"]) == (5, 1)
    assert rating["seconds"] >= 0


def test_to_join_twice_takes_one_place(study):
    link = study.join(" ann ")
    assert study.join("ann") == link  # the answer was lost, or the button clicked twice
    rate_next(study, link)
    with pytest.raises(ValueError, match="'ann' is taken"):
        study.join("ann")
    others = {study.join(f"rater {number}") for number in range(5)}
    assert len(others) == 5
    with pytest.raises(ValueError, match="all places"):
        study.join("too late")


def test_two_people_of_one_pseudonym_do_not_share_a_link(study, monkeypatch):
    link = study.join("ann", page="one")
    with pytest.raises(ValueError, match="'ann' is taken"):
        study.join("ann", page="other")
    assert study.join("ann", page="one") == link
    monkeypatch.setattr("trl_drcd.ratings.store.ABANDONED", -1)
    assert study.join("ann", page="other") == link  # who has chosen it has gone


def test_books_that_were_imported_are_not_given_out(study):
    for row in study.rows("SELECT * FROM slots JOIN items USING (item) WHERE book = 0"):
        answer = Answer(3, 4) if row["question"] == "quality" else Answer(preference=4)
        assert study.import_rating("a worker", row["slot"], answer, True)
    assert simulate(study, SimulateArguments(str(study.folder), judges=["quality", "diversity"], raters=1))
    assert study.rows("SELECT book FROM raters WHERE book IS NOT NULL") == [{"book": 1}]
    assert simulate(study, SimulateArguments(str(study.folder), judges=["quality", "diversity"]))
    with pytest.raises(ValueError, match="all places"):
        study.join("too late", simulated=True)


def test_a_design_that_is_killed_leaves_no_study(study, evaluation, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_drcd.ratings.store._rename_new", killed)
    arguments = DesignArguments(str(evaluation), str(tmp_path / "new"), raters=6)
    with pytest.raises(KeyboardInterrupt):
        create_study(arguments)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["clips"]
    monkeypatch.undo()
    assert create_study(arguments)[0].join("ann")
    with pytest.raises(FileExistsError, match="already has a study"):  # of another process, meanwhile
        _rename_new(study.folder / FILE, tmp_path / "new" / FILE)


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "line\nbreak", "\u202eevil", None])
def test_pseudonyms(study, name):
    with pytest.raises(ValueError, match="1 to 40 printable characters"):
        study.join(name)


def test_what_is_refused(study):
    link = study.join("ann")
    task = study.next_task(link)
    with pytest.raises(ValueError, match="play every clip first: 2 of 2"):
        study.rate(link, task.slot, Answer(1, 2))
    study.mark_played(link, task.slot, "left0")
    study.mark_played(link, task.slot, "left0")
    assert study.next_task(link).played == {"left0"}  # also after a reload
    with pytest.raises(ValueError, match="1 of 2"):
        study.rate(link, task.slot, Answer(1, 2))
    study.mark_played(link, task.slot, "right0")
    for answer in (
        Answer(0, 2),
        Answer(1, 6),
        Answer(1, None),
        Answer(preference=3),
        Answer(1, 2, 3),
        Answer(True, 2),
    ):
        with pytest.raises(ValueError, match="must be"):
            study.rate(link, task.slot, answer)
    for place in ("left1", "up0", ""):
        with pytest.raises(ValueError, match="is not a clip"):
            study.mark_played(link, task.slot, place)
    other = study.join("bob")
    with pytest.raises(ValueError, match="not in this rater's book"):
        study.rate(other, task.slot, Answer(1, 2))
    for unknown in ("", "x' OR 1=1 --", None):
        with pytest.raises(ValueError, match="personal link is unknown"):
            study.next_task(unknown)
    assert study.ratings() == []


def test_people_and_simulated_raters_do_not_mix(study):
    study.join("ann")
    with pytest.raises(ValueError, match="this study has human raters"):
        study.join("simulated 1", simulated=True)
    assert not study.simulated


def test_what_a_rater_leaves_another_takes(study):
    link = study.join("ann")
    first, _ = rate_next(study, link)
    left = study.progress(link)[1] - 1
    assert study.release("ann") == left
    assert study.next_task(link) is None and study.progress(link) == (1, 1)
    for number in range(5):
        study.join(f"rater {number}")
    heir = study.join("bob")
    assert study.progress(heir) == (0, left)
    assert first not in {slot["slot"] for slot in study.rows("SELECT slot FROM slots WHERE book = 6")}
    with pytest.raises(ValueError, match="is not a rater"):
        study.release("nobody")
    with pytest.raises(ValueError, match="rated everything"):
        study.release("ann")


def test_names_of_clips_tell_nothing(study):
    text = " ".join(path.name for path in (study.folder / "clips").iterdir())
    assert not any(word in text.lower() for word in ("base", "cfg", "beta", "lerp", "degraded"))
    link = study.join("ann")
    while task := study.next_task(link):
        for clip in (*task.left, *task.right):
            assert (study.folder / "clips" / clip).is_file() and len(clip) == len("0123456789abcdef.wav")
        rate_next(study, link)


def test_a_study_is_not_overwritten(study, evaluation):
    from trl_drcd.ratings.design import DesignArguments

    with pytest.raises(FileExistsError, match="already has a study"):
        create_study(DesignArguments(str(evaluation), str(study.folder), raters=6))
    with pytest.raises(FileNotFoundError, match=r"study\.sqlite"):
        Study(study.folder / "clips")
