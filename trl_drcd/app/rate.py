"""The tab Rate: blind comparisons as in the paper; every answer is stored before the next item is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from trl_drcd.app import pages
from trl_drcd.ratings.design import SECONDS
from trl_drcd.ratings.store import CLIPS_FOLDER, Answer, Study, Task

SCORES = [("1 bad", 1), ("2 poor", 2), ("3 fair", 3), ("4 good", 4), ("5 excellent", 5)]
PREFERENCES = [
    ("Left pair, much more", 1), ("Left pair, a little more", 2), ("Both alike", 3),
    ("Right pair, a little more", 4), ("Right pair, much more", 5),
]  # fmt: skip
SIMULATED = "The raters of this study are SIMULATED, and people cannot join it. Make another study for people."


@dataclass(frozen=True)
class View:
    """
    What a rater sees.

    Args:
        place (`str`): `"welcome"`, `"task"` or `"finished"`.
        link (`str`): The rater's personal link; empty before the start.
        slot (`str`): Slot of the comparison.
        question (`str`): Its question.
        task, left, right (`str`): HTML of the comparison and of both sides.
        message (`str`): HTML of an error message.
    """

    place: str
    link: str = ""
    slot: str = ""
    question: str = ""
    task: str = ""
    left: str = ""
    right: str = ""
    message: str = ""


class Rate:
    """
    Behaviour of the tab, without its layout.

    Args:
        study ([`Study`]): The study.
        sync (*optional*): An object whose `save()` copies the ratings elsewhere, called after each rating.
    """

    def __init__(self, study: Study, sync: Any = None) -> None:
        self.study, self.sync = study, sync

    def welcome(self) -> str:
        """HTML of the instructions."""
        of_question = {
            row["question"]: row["n"] / max(1, row["books"])
            for row in self.study.rows(
                "SELECT question, count(*) AS n, count(DISTINCT book) AS books FROM slots JOIN items USING (item) "
                "GROUP BY question"
            )
        }
        seconds = sum(count * SECONDS[question] for question, count in of_question.items())
        return pages.render(
            "welcome.html.j2", kind=self.study.about["kind"], count=round(sum(of_question.values())),
            minutes=max(1, round(seconds / 60)), quality="quality" in of_question,
            diversity="diversity" in of_question,
        )  # fmt: skip

    def open(self, link: str) -> View:
        """The next comparison of a personal link; the instructions if the link is empty or unknown."""
        if not link:
            return View("welcome", message=pages.notice(SIMULATED, "error") if self.study.simulated else "")
        try:
            return self._next(link)
        except ValueError as error:
            return View("welcome", message=pages.notice(str(error), "error"))

    def begin(self, pseudonym: str, page: str = "") -> View:
        """Join the study under a pseudonym, on a page that is told apart by its `session_hash`."""
        try:
            return self._next(self.study.join(pseudonym, page=page))
        except ValueError as error:
            return View("welcome", message=pages.notice(str(error), "error"))

    def answer(self, link: str, slot: str, left: Any, right: Any, preference: Any) -> View:
        """
        Store an answer and show the next comparison. The slot is that of the page when the button was clicked, so a
        second click refers to the same slot and changes nothing.
        """
        try:
            task = self.study.task(link, int(slot))
            if task.question == "quality":
                answer = Answer(left=_chosen(left), right=_chosen(right))
                if answer.left is None or answer.right is None:
                    raise ValueError("give both sides a score from 1 to 5")
            else:
                answer = Answer(preference=_chosen(preference))
                if answer.preference is None:
                    raise ValueError("choose one of the five answers")
            new = self.study.rate(link, task.slot, answer)
        except ValueError as error:
            return View("task", link, slot, message=pages.notice(str(error), "error"))
        if new and self.sync is not None:
            self.sync.save()
        return self._next(link)

    def _next(self, link: str) -> View:
        task = self.study.next_task(link)
        if task is None:
            return View("finished", link)
        done, every = self.study.progress(link)
        shown = pages.render(
            "task.html.j2", done=done, all=every, link=link, question=task.question, prompt=task.prompt
        )
        pair = " pair" if task.question == "diversity" else ""
        left, right = (
            pages.side(f"{side.capitalize()}{pair}", self._clips(task, link, side)) for side in ("left", "right")
        )
        return View("task", link, str(task.slot), task.question, shown, left, right)

    def _clips(self, task: Task, link: str, side: str) -> list[dict[str, Any]]:
        clips: list[dict[str, Any]] = []
        for number, place in enumerate(place for place in task.places if place.startswith(side)):
            name = str(task.clip(place))
            if name.endswith(".txt"):
                text = (self.study.folder / CLIPS_FOLDER / name).read_text(encoding="utf-8")
                clips.append({"text": text})
                continue
            address = f"{quote(link)}/{task.slot}/{place}"
            label = f"{side.capitalize()} clip" + (f" {number + 1}" if task.question == "diversity" else "")
            clips.append({
                "label": label, "sound": f"rate/clip/{address}", "played_url": f"rate/played/{address}",
                "played": place in task.played,
            })  # fmt: skip
        return clips


def _chosen(value: Any) -> int | None:
    """Value of a radio button; `None` if nothing is chosen."""
    return None if value is None or value == "" else int(value)


def build(gr: Any, blocks: Any, rate: Rate) -> list[Any]:
    """
    Add instructions, comparison and final message to a tab.

    Returns:
        `list`: Components, in the order of the values returned by [`updates`].
    """
    link, slot = (gr.Textbox(visible="hidden", elem_id=f"rate-{name}", label=name) for name in ("link", "slot"))
    with gr.Column(visible=True) as welcome:
        gr.HTML(rate.welcome())
        pseudonym = gr.Textbox(label="Pseudonym", max_length=40, elem_id="rate-pseudonym")
        begin = gr.Button("Begin", variant="primary", elem_id="rate-begin")
    with gr.Column(visible=False) as task:
        about = gr.HTML(elem_id="rate-task")
        with gr.Row():
            with gr.Column(min_width=260):
                left = gr.HTML(elem_id="rate-left")
                score_left = gr.Radio(SCORES, label="Left", elem_id="rate-score-left")
            with gr.Column(min_width=260):
                right = gr.HTML(elem_id="rate-right")
                score_right = gr.Radio(SCORES, label="Right", elem_id="rate-score-right")
        preference = gr.Radio(PREFERENCES, label="More diverse", elem_id="rate-preference")
        submit = gr.Button("Next", variant="primary", elem_id="rate-next")
    with gr.Column(visible=False) as finished:
        gr.HTML(pages.notice("All comparisons are done and stored. Thank you!"), elem_id="rate-finished")
    message = gr.HTML(elem_id="rate-message")
    shown = [link, slot, welcome, task, finished, about, left, right, score_left, score_right, preference, message]

    def updates(view: View) -> list[Any]:
        place = [gr.update(visible=view.place == name) for name in ("welcome", "task", "finished")]
        if view.place == "task" and not view.task:  # the same comparison, with a message
            return [*[gr.skip()] * (len(shown) - 1), view.message]
        quality = view.question == "quality"
        scores = [gr.update(value=None, visible=visible) for visible in (quality, quality, not quality)]
        return [view.link, view.slot, *place, view.task, view.left, view.right, *scores, view.message]

    def on_load(request: gr.Request) -> list[Any]:
        return updates(rate.open(str(request.query_params.get("rater") or "")))

    def on_begin(name: str, request: gr.Request) -> list[Any]:
        return updates(rate.begin(name, str(request.session_hash)))

    for each in (on_load, on_begin):
        each.__annotations__["request"] = gr.Request
    options = {"show_progress": "hidden", "concurrency_limit": 16, "api_visibility": "private"}
    keep = "(link) => { if (link) history.replaceState(null, '', '?rater=' + encodeURIComponent(link)); }"
    blocks.load(on_load, None, shown, **options)
    gr.on([begin.click, pseudonym.submit], on_begin, pseudonym, shown, trigger_mode="once", **options).then(
        None, link, None, js=keep
    )
    submit.click(
        lambda *values: updates(rate.answer(*values)), [link, slot, score_left, score_right, preference], shown,
        trigger_mode="once", **options,
    )  # fmt: skip
    return shown
