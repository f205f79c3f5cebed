"""The tab Play: sample an interpolation set in memory, next to guidance on the base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

from trl_drcd.app import pages
from trl_drcd.app.engine import MAX_TEMPERATURE, Ask, Cancelled, Drawn, Engine, Job
from trl_drcd.app.media import Media

EVERY_S = 0.25


class Play:
    """
    Behaviour of the tab, without its layout.

    Args:
        engine ([`Engine`]): The models.
        media ([`Media`]): Storage for audio and pictures.
    """

    def __init__(self, engine: Engine, media: Media) -> None:
        self.engine, self.media = engine, media
        self._jobs: dict[str, list[Job]] = {}
        self._lock = threading.Lock()

    def weights(self, sliders: tuple[float, ...]) -> tuple[float, ...]:
        """
        Weights of the ends: from lambda for two ends, else the normalised values of their sliders.

        Raises:
            ValueError: If all sliders are at 0.
        """
        if len(self.engine.args.ends) == 1:
            return (1.0,)
        if len(self.engine.args.ends) == 2:
            return (1 - float(sliders[0]), float(sliders[0]))
        if sliders and not sum(sliders) > 0:
            raise ValueError("all sliders are at 0; set at least one above 0")
        return tuple(float(share) / sum(sliders) for share in sliders)

    def heading(self, weights: tuple[float, ...]) -> str:
        """Heading for samples with these weights."""
        names = self.engine.names
        if len(names) == 2:
            return f"λ = {weights[1]:.2f} from {names[0]} to {names[1]}"
        parts = [f"{weight:.2f} {name}" for weight, name in zip(weights, names, strict=True)]
        return " + ".join(parts) if len(parts) > 1 else names[0] if names else "The model"

    def asks(self, values: dict[str, Any], sliders: tuple[float, ...]) -> list[tuple[str, Ask]]:
        """Headings and requests for samples under each."""
        weights = self.weights(sliders)
        ask = Ask(
            str(values["prompt"] or ""), weights, 1.0, str(values["negative"] or "") or None,
            float(values["temperature"]), int(values["seed"]), int(values["samples"]),
        )  # fmt: skip
        asked = [(self.heading(weights), ask)]
        if values["beside"]:
            gamma = float(values["gamma"])
            asked.append((f"Base with guidance, γ = {gamma:g}", replace(ask, weights=(), guidance_scale=gamma)))
        return asked

    def run(self, session: str, values: dict[str, Any], sliders: tuple[float, ...]) -> Iterator[list[str | None]]:
        """
        Sample; yield the HTML of both columns and of the status line, with `None` for what has not changed.

        Args:
            session (`str`): Session of the user.
            values (`dict`): Values of the controls, by name.
            sliders (`tuple[float, ...]`): lambda, or the share of each end.
        """
        job, columns = self._enter(session), ["", ""]
        try:
            asked = self.asks(values, sliders)
            for number, (heading, ask) in enumerate(asked):
                job.steps = 0
                drawn = yield from self._progress(heading, ask, job, session)
                columns[number] = self._column(heading, drawn)
                # The column of an earlier request stays until this one has something to show
                yield [*[columns[i] if i == number or not number else None for i in range(2)], None]
            yield [None, None, pages.notice("Done")]
        except Cancelled:
            if not job.replaced:
                yield [None, None, pages.notice(f"Cancelled after {job.steps} steps")]
        except (RuntimeError, TypeError, ValueError) as error:
            yield [None, None, pages.notice(str(error)[:500], "error")]
        finally:
            self._leave(session, job)

    def _enter(self, session: str) -> Job:
        """A new job of a session; it takes the place of one that still waits."""
        job = Job()
        with self._lock:
            jobs = self._jobs.setdefault(session, [])
            for waiting in (other for other in jobs if not other.started):
                waiting.replaced = True
                waiting.cancel()
            jobs.append(job)
        return job

    def _leave(self, session: str, job: Job) -> None:
        job.cancel()
        with self._lock:
            self._jobs[session].remove(job)
            if not self._jobs[session]:
                del self._jobs[session]

    def _progress(self, heading: str, ask: Ask, job: Job, session: str) -> Generator[list[str | None], None, Drawn]:
        """Sample in a separate thread and yield the progress meanwhile; return the samples."""
        result: list[Drawn] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                result.append(self.engine.sample(ask, job))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                # Only the first of a session's jobs reports, and none after it was cancelled: that is its last word
                reports = self._jobs[session][0] is job and not job.cancelled
                yield [None, None, self._report(heading, job) if reports else None]
                thread.join(EVERY_S)
        except GeneratorExit:  # the page was closed
            job.cancel()
            thread.join()
            raise
        if errors:
            raise errors[0]
        return result[0]

    def _column(self, heading: str, drawn: Drawn) -> str:
        samples = [
            self.media.sample(completion, f"{heading}, sample {number}")
            for number, completion in enumerate(drawn.completions, 1)
        ]
        return pages.column(heading, drawn.cost(), samples)

    def _report(self, heading: str, job: Job) -> str:
        if not job.started:
            return pages.notice("Waiting for an earlier request")
        return pages.notice(f"{heading}: step {job.steps} of at most {self.engine.args.max_new_tokens}")

    def cancel(self, session: str) -> str | None:
        """
        Cancel the jobs of a session, those that wait too. They say so themselves: a message from here could be
        overtaken by one of theirs.

        Returns:
            `str` or `None`: HTML of a message if there is none to cancel.
        """
        with self._lock:
            jobs = list(self._jobs.get(session, []))
            for job in jobs:
                job.cancel()
        return None if jobs else pages.notice("Nothing is running")


def build(gr: Any, blocks: Any, play: Play) -> None:
    """Add the controls and columns to a tab."""
    ends, examples = play.engine.names, play.engine.args.examples
    with gr.Row():
        prompt = gr.Textbox(
            examples[0] if examples else "",
            label="Prompt",
            lines=2,
            max_lines=4,
            scale=3,
            min_width=280,
            elem_id="play-prompt",
        )
        negative = gr.Textbox(
            label="Negative prompt for guidance",
            lines=2,
            max_lines=4,
            scale=2,
            min_width=280,
            placeholder="none: unconditional",
        )
    if len(examples) > 1:
        gr.Examples(examples, prompt, label="Example prompts")
    if len(ends) == 2:
        sliders = [gr.Slider(0, 1, 0.5, step=0.01, label=f"λ: 0 is {ends[0]}, 1 is {ends[1]}", elem_id="play-lambda")]
    else:
        sliders = [gr.Slider(0, 1, 1, step=0.01, label=f"Share of {name}") for name in (ends if len(ends) > 2 else [])]
    with gr.Row():
        temperature = gr.Slider(0.1, min(2.0, MAX_TEMPERATURE), 0.99, step=0.01, label="Temperature")
        samples = gr.Slider(
            1, play.engine.args.most_samples, min(2, play.engine.args.most_samples), step=1, label="Samples"
        )
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    with gr.Row():
        beside = gr.Checkbox(True, label="Compare with guidance on the base, at the same seed")
        gamma = gr.Slider(1, 8, 3, step=0.5, label="Guidance scale γ")
    with gr.Row():
        button = gr.Button("Sample", variant="primary", elem_id="play-sample")
        stop = gr.Button("Cancel", elem_id="play-cancel")
    status = gr.HTML(elem_id="play-status")
    columns = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=280):
                columns.append(gr.HTML(elem_id=f"play-{side}"))
    names = ("prompt", "negative", "temperature", "seed", "samples", "beside", "gamma")
    controls = [prompt, negative, temperature, seed, samples, beside, gamma]

    def run(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        given = dict(zip(names, values, strict=False))
        for shown in play.run(str(request.session_hash), given, tuple(values[len(names) :])):
            yield [gr.skip() if html is None else html for html in shown]

    def cancel(request: gr.Request) -> Any:
        html = play.cancel(str(request.session_hash))
        return gr.skip() if html is None else html

    def close(request: gr.Request) -> None:
        play.cancel(str(request.session_hash))

    run.__annotations__["request"] = cancel.__annotations__["request"] = close.__annotations__["request"] = gr.Request
    triggers: list[Callable[..., Any]] = [button.click, prompt.submit, *(slider.release for slider in sliders)]
    # Waiting is left to the engine, in order, since a request that waits in Gradio's queue could not be cancelled
    gr.on(
        triggers, run, [*controls, *sliders], [*columns, status], concurrency_limit=None, trigger_mode="multiple",
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    stop.click(cancel, None, status, queue=False, show_progress="hidden", api_visibility="private")
    blocks.unload(close)
