"""Ratings copied to a data set on the Hub while a study runs: the real scheduler, over HTTP to the Hub on loopback."""

import csv
from io import StringIO

import pytest

from tests.ratings.conftest import make_evaluation
from trl_drcd.app.rate import Rate
from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.study import create_study
from trl_drcd.ratings.sync import Sync

NAME = "datasets/ann/ratings"


@pytest.fixture
def study(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", "text", 2, ["base", "quality"], ["harp", "drum"])
    return create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=3, raters_per_item=3))[0]


@pytest.fixture
def sync(hub, study):
    sync = Sync(study, "ann/ratings")
    yield sync
    sync.scheduler.stop()


def rate(study, sync, score: int) -> None:
    """One more answer of a new rater."""
    page = Rate(study, sync)
    view = page.begin(f"rater {score}")
    for place in study.task(view.link, int(view.slot)).places:
        study.mark_played(view.link, int(view.slot), place)
    page.answer(view.link, view.slot, score, 4, None)


def on_hub(hub) -> list[str]:
    """Raters of the copied ratings."""
    text = hub.repos[NAME].files["ratings.csv"].decode()
    return [row["rater"] for row in csv.DictReader(StringIO(text))]


def test_ratings_arrive_in_a_private_data_set(hub, study, sync):
    rate(study, sync, 3)
    sync.scheduler.trigger().result()
    assert hub.repos[NAME].private and len(on_hub(hub)) == 1
    rate(study, sync, 5)
    sync.scheduler.trigger().result()
    assert len(on_hub(hub)) == 2
    assert set(hub.repos[NAME].files) == {".gitattributes", "ratings.csv"}, "the database and its links stay here"


def test_what_a_fault_leaves_out_comes_with_the_next_copy(hub, study, sync):
    rate(study, sync, 3)
    hub.fail("/commit/", 500, times=9)
    with pytest.raises(Exception, match="500"):
        sync.scheduler.trigger().result()
    hub.faults.clear()
    sync.scheduler.trigger().result()
    assert len(on_hub(hub)) == 1
