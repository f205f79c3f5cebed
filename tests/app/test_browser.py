"""The app in a real browser, on desktop and phone; screenshots go to the folder in DRCD_SCREENSHOTS, if given."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.app.conftest import Server
from tests.ratings.conftest import MODELS, make_evaluation
from trl_drcd.app.export import export_page
from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.store import Study
from trl_drcd.ratings.study import create_study

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
LOW_CONTRAST = Path(__file__).with_name("low_contrast.js").read_text()
EVIL = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture(scope="module")
def chromium():
    """A running browser."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    pytest.importorskip("gradio", reason="needs the extra app")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page_of(chromium):
    """Opens pages of a size; afterwards, that nothing came from elsewhere and no script failed."""
    contexts, troubles = [], []

    def open_page(url, size="desktop", scheme="light"):
        phone = size == "phone"
        context = chromium.new_context(viewport=SIZES[size], is_mobile=phone, has_touch=phone, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda r: troubles.append(r.url) if re.match(r"https?://(?!127\.0\.0\.1)", r.url) else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def shoot(page, name):
    if folder := os.environ.get("DRCD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def low_contrast(page):
    """Texts that are hard to read."""
    page.mouse.move(5, page.viewport_size["height"] - 5)  # no button is under the pointer
    page.wait_for_timeout(500)  # colours change slowly
    return page.evaluate(LOW_CONTRAST)


def fits(page):
    """Nothing is cut off to the right."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def server(models, evaluation, tmp_path_factory):
    """Play and Listen."""
    server = Server(
        "--model", models[0], "--ends", *models[1:], "--max_new_tokens", "600", "--evaluation", str(evaluation),
        log=tmp_path_factory.mktemp("server") / "log.txt",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.mark.parametrize("size", SIZES)
def test_play_and_slide(server, page_of, size):
    page = page_of(server.url, size)
    page.get_by_label("Prompt", exact=True).fill("a slow tune for flute")
    page.get_by_role("button", name="Sample").click()
    page.locator("#play-status").get_by_text("Done").wait_for()
    left, right = page.locator("#play-left"), page.locator("#play-right")
    assert "λ = 0.50 from quality to diversity" in left.inner_text() and "1 pass per token" in left.inner_text()
    assert "γ = 3" in right.inner_text() and "2 passes per token" in right.inner_text()
    before = left.locator("article").first.inner_text()
    slider = page.get_by_role("slider", name=re.compile("λ"))
    slider.focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    assert float(slider.input_value()) == 1.0
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)  # and released, which samples
    left.get_by_text(re.compile(r"λ = 0\.7\d")).wait_for()
    page.locator("#play-status").get_by_text("Done").wait_for()
    assert left.locator("article").first.inner_text() != before
    assert fits(page)
    shoot(page, f"play_{size}")


def test_a_prompt_is_no_html(server, page_of):
    page = page_of(server.url)
    page.get_by_label("Prompt", exact=True).fill(EVIL)
    page.get_by_label("Negative prompt for guidance").fill(EVIL)
    page.get_by_role("button", name="Sample").click()
    page.locator("#play-status").get_by_text("Done").wait_for()
    assert page.title() != "hacked" and page.locator("img[src=x]").count() == 0


def test_cancel_and_a_second_user_who_waits(models, page_of, tmp_path):
    server = Server("--model", models[0], "--ends", *models[1:], "--max_new_tokens", "2000", log=tmp_path / "log.txt")
    try:
        _cancel_and_wait(page_of(server.url), page_of(server.url))
    finally:
        server.stop()


def _cancel_and_wait(one, two):
    for page in (one, two):
        page.get_by_label("Prompt", exact=True).fill("a fast tune")
    one.get_by_role("button", name="Sample").click()
    one.locator("#play-status").get_by_text(re.compile(r"step [1-9]")).wait_for()
    two.get_by_role("button", name="Sample").click()
    one.get_by_role("button", name="Cancel").click()
    one.locator("#play-status").get_by_text("Cancelled").wait_for()
    two.locator("#play-status").get_by_text("Done").wait_for()  # its turn came, and it was not cancelled
    assert "Cancelled" in one.locator("#play-status").inner_text()
    one.get_by_role("button", name="Sample").click()
    one.locator("#play-status").get_by_text(re.compile(r"step [1-9]")).wait_for()
    two.get_by_role("button", name="Sample").click()
    two.locator("#play-status").get_by_text("Waiting for an earlier request").wait_for()
    two.get_by_role("button", name="Cancel").click()
    two.locator("#play-status").get_by_text("Cancelled after 0 steps").wait_for()
    one.locator("#play-status").get_by_text("Done").wait_for()  # and that of the other was not cancelled
    assert "Cancelled" in two.locator("#play-status").inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_listen(server, page_of, size):
    page = page_of(server.url, size)
    page.get_by_role("tab", name="Listen").click()
    samples = page.locator("#listen-samples")
    samples.locator("audio").first.wait_for()
    assert samples.locator("audio").count() == 6 * 5 * 3
    assert page.title() != "hacked" and fits(page)  # one of the prompts is an <img onerror>
    player = samples.get_by_label("base, sample 1: slow waltz")
    player.evaluate("audio => audio.play()")
    page.wait_for_function("audio => audio.currentTime > 0.1 && !audio.error", arg=player.element_handle())
    page.get_by_label("Prompts that contain").fill("waltz")
    page.wait_for_function("document.querySelectorAll('#listen-samples section').length == 1")
    page.get_by_role("checkbox", name="CFG", exact=True).uncheck()
    page.wait_for_function("document.querySelectorAll('#listen-samples article').length == 4")
    if size == "desktop":  # the strategies stand side by side
        tops = {round(box["y"]) for box in (item.bounding_box() for item in samples.locator("article").all())}
        assert len(tops) == 1
    shoot(page, f"listen_{size}")


# ---------------------------------------------------------------- rate


def play_all(page):
    """Plays every clip of the comparison to its end."""
    for audio in page.locator(".drcd-side audio").all():
        audio.evaluate("audio => audio.play()")
    page.wait_for_function("!document.querySelector('.drcd-clip:not(.drcd-played)')")


def rate_one(page, study, left="4", right="2"):
    slot = page.locator("#rate-slot textarea, #rate-slot input").input_value()
    play_all(page)
    if page.locator("#rate-score-left").is_visible():
        for side, score in (("left", left), ("right", right)):
            page.locator(f"#rate-score-{side}").get_by_role("radio", name=re.compile(f"^{score}")).check()
    else:
        page.locator("#rate-preference").get_by_role("radio", name="Both alike").check()
    page.get_by_role("button", name="Next").click()
    page.wait_for_function(
        "slot => document.querySelector('#rate-slot textarea, #rate-slot input').value != slot"
        " || document.querySelector('#rate-finished')?.offsetParent", arg=slot,
    )  # fmt: skip
    return slot


def begin(page, name):
    page.get_by_label("Pseudonym").fill(name)
    page.get_by_role("button", name="Begin").click()
    page.locator("#rate-task blockquote").wait_for()
    page.wait_for_url("**?rater=*")


@pytest.fixture
def small_study(tmp_path):
    """Two models, three prompts: 3 comparisons of quality, 2 of diversity, a check of each."""
    folder = make_evaluation(
        tmp_path / "evaluation", samples=2, models=MODELS[:2], prompts=["slow waltz", EVIL, "jig"]
    )
    arguments = DesignArguments(
        str(folder), str(tmp_path / "study"), raters=2, raters_per_item=2, diversity_prompts=2, checks=1
    )
    return create_study(arguments)[0]


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_study_by_two_raters(small_study, page_of, tmp_path, size):
    """Two at once, one of whom reloads in the middle; the server is killed in between, and nothing is lost."""
    server = Server("--study", str(small_study.folder), log=tmp_path / "log.txt")
    try:
        one, two = page_of(server.url, size), page_of(server.url, size)
        shoot(one, f"welcome_{size}")
        begin(one, EVIL)
        begin(two, "bob")
        one.get_by_role("button", name="Next").click()
        one.locator("#rate-message").get_by_text(re.compile("give both sides|play every clip")).wait_for()
        assert fits(one)
        shoot(one, f"rate_{size}")
        done = [rate_one(one, small_study), rate_one(two, small_study)]
        one.reload()
        one.locator("#rate-task blockquote").wait_for()
        assert "Comparison 2 of 7" in one.locator("#rate-task").inner_text()
        server.kill()
        server.start()
        for page in (one, two):
            page.reload()
            page.locator("#rate-task blockquote").wait_for()
        for page in (one, two):
            while not page.locator("#rate-finished").is_visible():
                if page.locator("#rate-preference").is_visible() and page is one:
                    shoot(page, f"rate_diversity_{size}")
                done.append(rate_one(page, small_study))
            assert page.title() != "hacked" and page.locator("img[src=x]").count() == 0
    finally:
        server.stop()
    ratings = Study(small_study.folder).ratings()
    assert len(ratings) == len(done) == len(set(done)) == 2 * 7
    assert {rating["pseudonym"] for rating in ratings} == {EVIL[:40], "bob"}


def test_a_double_click_and_a_lost_connection(small_study, page_of, tmp_path):
    server = Server("--study", str(small_study.folder), log=tmp_path / "log.txt")
    try:
        page = page_of(server.url)
        begin(page, "ann")
        play_all(page)
        for side in ("left", "right"):
            page.locator(f"#rate-score-{side}").get_by_role("radio", name=re.compile("^5")).check()
        page.get_by_role("button", name="Next").dblclick()
        page.locator("#rate-task").get_by_text("Comparison 2 of").wait_for()
        time.sleep(1)
        assert len(small_study.ratings()) == 1
        page.context.set_offline(True)
        page.locator(".drcd-side audio").first.evaluate("audio => audio.play()")
        page.get_by_text("not saved; play again").wait_for()
        page.context.set_offline(False)
        page.reload()
        page.locator("#rate-task blockquote").wait_for()
        rate_one(page, small_study)
        assert len(small_study.ratings()) == 2
    finally:
        server.stop()


def test_by_keyboard_alone(small_study, page_of, tmp_path):
    server = Server("--study", str(small_study.folder), log=tmp_path / "log.txt")
    try:
        page = page_of(server.url)
        page.get_by_label("Pseudonym").focus()
        page.keyboard.type("ann")
        page.keyboard.press("Enter")
        page.locator("#rate-task blockquote").wait_for()
        play_all(page)
        for side in ("left", "right"):
            page.locator(f"#rate-score-{side}").get_by_role("radio").first.focus()
            page.keyboard.press("Space")
            page.keyboard.press("ArrowRight")
        page.get_by_role("button", name="Next").focus()
        page.keyboard.press("Enter")
        page.locator("#rate-task").get_by_text("Comparison 2 of").wait_for()
        (rating,) = small_study.ratings()
        assert (rating["score_left"], rating["score_right"]) == (2, 2)
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_and_fields_have_names(models, evaluation, small_study, page_of, tmp_path, scheme):
    """Contrast of all three tabs, and what a screen reader says of each field and player."""
    server = Server(
        "--model", models[0], "--ends", *models[1:], models[0], "--evaluation", str(evaluation),
        "--study", str(small_study.folder), log=tmp_path / "log.txt",
    )  # fmt: skip
    try:
        page = page_of(server.url, scheme=scheme)
        for tab in ("Play", "Listen", "Rate"):
            page.get_by_role("tab", name=tab).click()
            assert low_contrast(page) == []
            shoot(page, f"{tab.lower()}_{scheme}")
        begin(page, "ann")
        page.get_by_role("button", name="Next").click()
        page.locator("#rate-message").get_by_text("give both sides").wait_for()
        assert low_contrast(page) == []
        assert page.get_by_role("radiogroup", name="Left").get_by_role("radio").count() == 5
        nameless = "[...document.querySelectorAll('audio')].filter((a) => !a.getAttribute('aria-label')).length"
        assert page.evaluate(nameless) == 0 < page.locator("audio").count()
        page.get_by_role("tab", name="Play").click()
        for name in ("quality", "diversity", "base"):  # one slider for each of N ends
            assert page.get_by_role("slider", name=re.compile(f"Share of {name}")).count() == 1
    finally:
        server.stop()


# ---------------------------------------------------------------- the static page


@pytest.mark.parametrize("size", SIZES)
def test_the_static_page_opens_fast(page_of, tmp_path, size):
    """20 prompts x 8 strategies x 2 samples, from disk: ready to listen to in less than 2 s."""
    models, prompts = [f"strategy {i}" for i in range(8)], [f"prompt {i}" for i in range(19)] + [EVIL]
    evaluation = make_evaluation(tmp_path / "evaluation", samples=2, models=models, prompts=prompts)
    index = export_page(str(evaluation), str(tmp_path / "page"), "Our models")
    page = page_of(index.as_uri(), size)
    timings = []
    for _ in range(3):  # the least of them, as other processes may have the cores
        page.reload()
        timings.append(page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart"))
    timing = min(timings)
    print(f"{size}: {timing} ms, {index.stat().st_size / 1024:.0f} KiB of HTML")
    assert 0 < timing < 2000
    assert page.locator("audio").count() == 320 and page.title() == "Our models" and fits(page)
    first = page.locator("audio").first
    first.evaluate("audio => audio.play()")
    page.wait_for_function("audio => audio.currentTime > 0.1 && !audio.error", arg=first.element_handle())
    assert low_contrast(page) == []
    shoot(page, f"static_{size}")
    page.get_by_label("Prompts that contain").fill("prompt 7")
    page.get_by_role("checkbox", name="strategy 3").uncheck()
    assert page.locator("section:visible").count() == 1 and page.locator("article:visible").count() == 7
