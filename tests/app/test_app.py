"""The app without a browser: arguments, sampling, rating, what is served, and that no text becomes HTML."""

import re
import threading
import time

import pytest
import torch

from tests.ratings.conftest import make_evaluation
from trl_drcd.app import pages
from trl_drcd.app.arguments import AppArguments
from trl_drcd.app.engine import Ask, Cancelled, Engine, Job, Turns
from trl_drcd.app.export import export_page
from trl_drcd.app.listen import Listen
from trl_drcd.app.media import Media
from trl_drcd.app.play import Play
from trl_drcd.app.rate import Rate
from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.study import create_study

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def engine(models):
    return Engine(AppArguments(model=models[0], ends=models[1:], max_new_tokens=12))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give `model` to play"),
        ({"tabs": ["sing"], "model": "m"}, "`tabs` has"),
        ({"tabs": ["rate"], "model": "m"}, "the tab rate needs `study`"),
        ({"model": "m", "port": 0}, "`port` must be between"),
        ({"model": "m", "dtype": "int8"}, "`dtype` must be"),
        ({"model": "m", "export": "out"}, "`export` needs an `evaluation`"),
        ({"model": "m", "most_samples": 0}, "`most_samples` must be at least 1"),
        ({"model": "m", "ends": ["a"], "end_names": ["a", "b"]}, "`end_names` must have one name per end"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        AppArguments(**given)


def test_the_demo_has_a_study_once_it_is_made(tmp_path, monkeypatch):
    from trl_drcd.app.arguments import DEMO_STUDY, WORLD

    monkeypatch.chdir(tmp_path)
    WORLD.mkdir(parents=True)
    assert AppArguments(demo=True).tabs == ["play"]
    DEMO_STUDY.mkdir(parents=True)
    (DEMO_STUDY / "study.sqlite").touch()
    assert AppArguments(demo=True).tabs == ["play", "rate"]


def test_tabs_are_those_that_have_what_they_need():
    assert AppArguments(evaluation="e").tabs == ["listen"]
    assert AppArguments(model="m", study="s").tabs == ["play", "rate"]
    assert AppArguments(model="m").host == "127.0.0.1"


# ---------------------------------------------------------------- play


def test_lambda_is_set_in_memory(engine, models):
    """At 0 and 1 the samples are the ends' own; in between the weights are the mixture."""
    alone = [Engine(AppArguments(model=models[0], ends=[end], max_new_tokens=12)) for end in models[1:]]
    for at, one in zip((0.0, 1.0), alone, strict=True):
        ask = Ask("a slow tune", (1 - at, at), seed=3)
        own = one.sample(Ask("a slow tune", (1.0,), seed=3), Job()).completions
        assert engine.sample(ask, Job()).completions == own
    engine.sample(Ask("a slow tune", (0.25, 0.75)), Job())
    ends = [one.models(one._rows[0]).state_dict() for one in alone]
    mixed = engine.models._loaded[1].state_dict()
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.25 * ends[0][name] + 0.75 * ends[1][name])


def test_passes_are_counted(engine):
    one = engine.sample(Ask("a tune", (0.5, 0.5), samples=3), Job())
    two = engine.sample(Ask("a tune", (), guidance_scale=3.0, samples=3), Job())
    assert one.passes == pytest.approx(1) and two.passes == pytest.approx(2)
    assert one.tokens == two.tokens == 12 and len(one.completions) == 3
    assert one.cost().startswith("1 pass per token, ") and two.cost().startswith("2 passes per token, ")


def test_the_same_seed_gives_the_same_samples(engine):
    one, same, other = (engine.sample(Ask("a tune", (0.5, 0.5), seed=s), Job()).completions for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "  "}, "the prompt must have 1 to"),
        ({"prompt": "x" * 5000}, "the prompt must have 1 to"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"samples": 9}, "between 1 and 8, got 9"),
        ({"guidance_scale": -1.0}, "guidance scale must be between"),
        ({"seed": -1}, "seed must be between"),
    ],
)
def test_what_is_not_sampled(engine, given, message):
    with pytest.raises(ValueError, match=message):
        engine.sample(Ask(**({"prompt": "a tune", "weights": (0.5, 0.5)} | given)), Job())


@pytest.fixture
def slow_steps(monkeypatch):
    """A step takes 20 ms or more, so that no call ends before it is cancelled, on a machine of any speed."""
    step = Job.step

    def slow(job):
        time.sleep(0.02)
        step(job)

    monkeypatch.setattr(Job, "step", slow)


def test_a_second_call_waits_and_a_cancelled_one_ends(models, slow_steps):
    engine = Engine(AppArguments(model=models[0], ends=models[1:], max_new_tokens=1500))
    first, second, ended = Job(), Job(), []

    def sample(name, job):
        try:
            engine.sample(Ask("a tune", (0.5, 0.5)), job)
            ended.append((name, "done"))
        except Cancelled:
            ended.append((name, "cancelled"))

    threads = [threading.Thread(target=sample, args=one) for one in (("first", first), ("second", second))]
    threads[0].start()
    while first.steps < 3:
        time.sleep(0.01)
    threads[1].start()
    time.sleep(0.2)
    assert second.steps == 0 and not ended  # it waits
    first.cancel()
    threads[0].join(timeout=60)
    assert ended == [("first", "cancelled")] and first.steps < 1500
    while second.steps < 3:
        time.sleep(0.01)
    second.cancel()
    threads[1].join(timeout=60)
    assert ended[1] == ("second", "cancelled")
    assert not engine.models.base.model._forward_pre_hooks


VALUES = {
    "prompt": "a tune", "negative": "", "temperature": 0.99, "seed": 0, "samples": 2, "beside": True, "gamma": 3,
}  # fmt: skip


def test_play_shows_both_ways(engine):
    play = Play(engine, Media())
    steps = list(play.run("ann", VALUES, (0.25,)))
    left = [html for html, _, _ in steps if html][-1]
    right = [html for _, html, _ in steps if html][-1]
    assert "λ = 0.25 from quality to diversity" in left and "1 pass per token" in left and left.count("<article") == 2
    assert "Base with guidance, γ = 3" in right and "2 passes per token" in right
    assert "Done" in steps[-1][2] and "Nothing is running" in play.cancel("ann")


def test_cancelled_is_the_last_word_of_a_job(models, slow_steps):
    """Of the running call and of one that waits; a later call takes the place of one that waits."""
    play = Play(Engine(AppArguments(model=models[0], ends=models[1:], max_new_tokens=3000)), Media())
    runs = [play.run("ann", VALUES, (at,)) for at in (0.1, 0.2, 0.3)]
    said: list[list[str]] = [[], [], []]
    while not re.search("step [1-9]", "".join(said[0])):
        said[0].append(next(runs[0])[2] or "")
    for number in (1, 2):
        next(runs[number])
    assert [step for step in runs[1] if step[2]] == []  # replaced: it ends and says nothing
    assert play.cancel("bob") is not None and play.cancel("ann") is None
    said[2] += [step[2] or "" for step in runs[2]]
    after = [step[2] or "" for step in runs[0]]
    assert re.search("Cancelled after [0-9]+ steps", after[-1]) and not "".join(after[:-1])
    assert "Cancelled after 0 steps" in said[2][-1] and not "".join(said[2][:-1])
    assert not play._jobs and not play.engine._turns._jobs


def test_turns_are_in_order():
    turns, ended, threads = Turns(), [], []
    first = Job()
    with turns.of(first):
        for name in "abc":
            job = Job()

            def wait(name=name, job=job):
                with turns.of(job):
                    ended.append(name)

            threads.append(threading.Thread(target=wait))
            threads[-1].start()
            while job not in turns._jobs:
                time.sleep(0.01)
        assert first.started and not ended
    for thread in threads:
        thread.join(timeout=60)
    assert ended == ["a", "b", "c"]


def test_play_says_what_is_wrong(engine):
    steps = list(Play(engine, Media()).run("ann", VALUES | {"prompt": ""}, (0.5,)))
    assert "the prompt must have" in steps[-1][2] and 'role="alert"' in steps[-1][2]


def test_many_ends_have_shares(models):
    play = Play(Engine(AppArguments(model=models[0], ends=[*models[1:], "base"], max_new_tokens=4)), Media())
    assert play.weights((1.0, 1.0, 2.0)) == (0.25, 0.25, 0.5)
    assert play.heading((0.25, 0.25, 0.5)) == "0.25 quality + 0.25 diversity + 0.50 base"
    with pytest.raises(ValueError, match="all sliders are at 0"):
        play.weights((0.0, 0.0, 0.0))
    assert play.engine.sample(Ask("a tune", play.weights((1, 1, 2))), Job()).completions


def test_media_are_forgotten_in_the_end():
    media = Media(most=2)
    names = [media.add(bytes([i]), "wav").removeprefix("media/") for i in range(3)]
    assert media.get(names[0]) is None and media.get(names[2]) == (b"\x02", "audio/wav")
    sample = media.sample((torch.zeros(4000), 8000), "silence")
    assert sample.sound.startswith("media/") and sample.picture.endswith(".png")


# ---------------------------------------------------------------- rate


def test_a_rater_goes_from_item_to_item(study):
    rate = Rate(study)
    assert "diversity" in rate.welcome().lower() and rate.open("").place == "welcome"
    assert "personal link is unknown" in rate.open("forged").message
    view = rate.begin("ann")
    seen = []
    while view.place == "task":
        assert not any(name in view.task + view.left + view.right for name in ("CFG", "beta", "LERP", "base"))
        if view.question == "quality":
            refused = rate.answer(view.link, view.slot, 3, None, None)
            assert "give both sides a score" in refused.message
        assert "play every clip" in rate.answer(view.link, view.slot, 3, 4, 3).message
        for place in study.task(view.link, int(view.slot)).places:
            study.mark_played(view.link, int(view.slot), place)
        again = rate.open(view.link)  # a reload in the middle
        assert again.slot == view.slot and again.left.count("drcd-played") == again.left.count("<audio")
        seen.append(view.slot)
        answered = rate.answer(view.link, view.slot, 3, 4, 2)
        if len(seen) == 1:  # the second of a double click is about the first comparison still
            assert rate.answer(view.link, view.slot, 5, 5, 5).slot == answered.slot
        view = answered
    assert view.place == "finished" and len(seen) == len(set(seen)) == len(study.ratings())
    assert {r["score_left"] for r in study.ratings()} == {3, None}


def test_people_are_told_at_once_that_raters_are_simulated(study):
    study.join("robot", simulated=True)
    view = Rate(study).open("")
    assert view.place == "welcome" and "SIMULATED" in view.message and 'role="alert"' in view.message


class Scheduler:
    """In place of the Hub's."""

    def __init__(self, **given):
        self.given, self.lock = given, threading.Lock()


def test_ratings_are_copied(study):
    from trl_drcd.ratings.sync import Sync

    sync = Sync(study, "ann/ratings", scheduler=Scheduler)
    assert sync.scheduler.given["private"] is True and sync.scheduler.given["repo_type"] == "dataset"
    rate = Rate(study, sync)
    view = rate.begin("ann")
    for place in study.task(view.link, int(view.slot)).places:
        study.mark_played(view.link, int(view.slot), place)
    rate.answer(view.link, view.slot, 3, 4, None)
    assert len((study.folder / "sync" / "ratings.csv").read_text().splitlines()) == 2


# ---------------------------------------------------------------- no text is HTML


def test_texts_are_never_html(tmp_path):
    models = ["base", EVIL]
    folder = make_evaluation(tmp_path / "evaluation", "text", 2, models, [EVIL, "plain"])
    for file in (folder / "samples").glob("m*/*.txt"):
        file.write_text(f"{EVIL}</div><script>alert(2)</script>")
    study, _ = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=3, raters_per_item=3))
    view = Rate(study).begin(EVIL)
    listen = Listen(str(folder))
    page = export_page(str(folder), str(tmp_path / "page"), EVIL).read_text()
    shown = [
        view.task, view.left, view.right, listen.show("", listen.strategies, 2), pages.notice(EVIL, "error"),
        pages.column(EVIL, EVIL, [Media().sample(EVIL, EVIL)]), page.partition("<main>")[2],
    ]  # fmt: skip
    for html in shown:
        assert "<img src=x" not in html and "<script>alert" not in html and "</div><script" not in html
        assert "&lt;img" in html
    assert "&lt;img" in page.partition("</title>")[0]


# ---------------------------------------------------------------- listen, and the static page


def test_filters(evaluation):
    listen = Listen(str(evaluation))
    every = listen.show("", listen.strategies, 3)
    assert every.count("<section") == 6 and every.count("<audio") == 6 * 5 * 3
    few = listen.show("WALTZ", ["CFG", "LERP"], 2)
    assert few.count("<section") == 1 and few.count("<audio") == 4 and few.count("aria-label=") == 5
    assert "No sample matches" in listen.show("nothing", listen.strategies, 1)
    assert "No sample matches" in listen.show("", [], 1)
    with pytest.raises(FileNotFoundError, match=r"no results\.jsonl"):
        Listen(str(evaluation / "samples"))


def test_the_static_page_stands_alone(evaluation, tmp_path):
    page = export_page(str(evaluation), str(tmp_path / "page"), "Our models")
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "") and "base64" not in text
    sounds = sorted((tmp_path / "page" / "audio").glob("*.wav"))
    assert len(sounds) == 90 and text.count('preload="none"') == 90
    assert text.index("<audio") < text.index('id="plots"') < text.index("<table")
    with pytest.raises(FileExistsError, match="is not empty"):
        export_page(str(evaluation), str(tmp_path / "page"), "again")


# ---------------------------------------------------------------- what is served


@pytest.fixture
def client(evaluation, study):
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from trl_drcd.app.server import make_app

    args = AppArguments(evaluation=str(evaluation), study=str(study.folder))
    return TestClient(make_app(args))


def test_only_what_is_meant_is_served(client, study):
    link = study.join("ann")
    slot = study.next_task(link).slot
    assert client.get(f"/rate/clip/{link}/{slot}/left0").content[:4] == b"RIFF"
    assert client.post(f"/rate/played/{link}/{slot}/left0").status_code == 204
    assert study.next_task(link).played == {"left0"}
    other = study.join("bob")
    for path in (f"{other}/{slot}/left0", f"{link}/{slot}/left7", f"{link}/9999/left0", "forged/1/left0"):
        assert client.get(f"/rate/clip/{path}").status_code == 404
        assert client.post(f"/rate/played/{path}").status_code == 404
    assert client.get("/samples/m0/00_0.wav").content[:4] == b"RIFF"
    for path in ("/samples/../results.jsonl", "/samples/%2e%2e/results.jsonl", "/media/x.wav"):
        assert client.get(path).status_code in (404, 405), path
    for name in (study.folder / "study.sqlite", "/etc/passwd"):
        assert client.get(f"/gradio_api/file={name}").status_code in (403, 404)


def test_nothing_comes_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text and "cdn" not in answer.text.lower()
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "[::1]:7860"}).status_code == 200
