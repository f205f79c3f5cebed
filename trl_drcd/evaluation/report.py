"""The report of `results.jsonl`: `summary.csv`, plots, and a page of tables and samples in HTML and Markdown."""

from __future__ import annotations

import base64
import csv
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trl_drcd.evaluation.claims import claims_tables
from trl_drcd.evaluation.listening import Clip, read_clips
from trl_drcd.evaluation.metrics import axes, in_order
from trl_drcd.evaluation.plots import Plot, write_plots
from trl_drcd.evaluation.points import Point, pooled
from trl_drcd.evaluation.report_tables import agreement_table, fronts_table, lambda_table, points_table
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.sampling import Prompt
from trl_drcd.evaluation.tables import Table, markdown, markdown_text
from trl_drcd.files import write_text

# Content security policy: no remote resources and no scripts
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self' file:; media-src 'self' file:; base-uri 'none'; form-action 'none'"  # noqa: E501


@dataclass(frozen=True)
class Sample:
    """
    A completion on the page.

    Args:
        label (`str`): Description: strategy, number of the sample, prompt.
        text (`str`, *optional*): The completion, if it is text.
        sound, picture (`str`, *optional*): URLs of a WAV file and its spectrogram, relative to the page.
    """

    label: str
    text: str | None = None
    sound: str = ""
    picture: str = ""


@dataclass
class Item:
    """The completions of one strategy for one prompt."""

    name: str
    samples: list[Sample] = field(default_factory=list)


@dataclass
class PromptItems:
    """A prompt and the completions of every strategy."""

    text: str
    items: list[Item] = field(default_factory=list)


@dataclass
class Page:
    """
    Contents of the report page.

    Args:
        title, introduction (`str`): Text at the top.
        tables (`list[Table]`): The first, of all points, goes above the plots; the others below them.
        prompts (`list[PromptItems]`): Completions by prompt.
        plots (`list[Plot]`): The plots.
    """

    title: str
    introduction: str
    tables: list[Table]
    prompts: list[PromptItems] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    @property
    def sounds(self) -> bool:
        """Whether any completion is audio."""
        return any(sample.sound for prompt in self.prompts for item in prompt.items for sample in item.samples)

    def html(self) -> str:
        """Render the page as HTML; all text is escaped."""
        return TEMPLATES.get_template("report.html.j2").render(page=self, policy=POLICY)

    def markdown(self) -> str:
        """Render introduction, tables and texts as Markdown; prompts and completions are escaped."""
        parts = [self.introduction]
        for table in self.tables:
            parts.append((f"## {table.heading}\n\n" if table.heading else "") + markdown(table))
        if self.prompts and not self.sounds:
            parts += ["## Completions", *map(_fenced, self.prompts)]
        return "\n\n".join(parts) + "\n"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _with_small_interval(cell: str) -> Markup | str:
    """`mean [low, high]` with the interval in small print below the mean; other cells are only escaped."""
    match = re.fullmatch(r"(\S+) (\[\S+ \S+\])", cell)
    return Markup("{}<small>{}</small>").format(*match.groups()) if match else escape(cell)


TEMPLATES = Environment(
    loader=PackageLoader("trl_drcd.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
TEMPLATES.filters |= {"data_uri": _data_uri, "interval": _with_small_interval}


def _fenced(prompt: PromptItems) -> str:
    """A prompt's completions as a section of Markdown, in a fence longer than any run of `~` in them."""
    texts = [f"{item.name}: {' '.join((s.text or '').split())}" for item in prompt.items for s in item.samples]
    lines = "\n".join(textwrap.fill(text, 110, subsequent_indent="    ") for text in texts)
    fence = "~" * (3 + max(map(len, re.findall("~+", lines)), default=0))
    return f"### {markdown_text(prompt.text)}\n\n{fence}text\n{lines}\n{fence}"


# ---------------------------------------------------------------- contents


def write_report(results: Sequence[Result], folder: Path) -> None:
    """
    Write `summary.csv`, the plots, `report.html` and, with its tables and texts, `report.md`.

    Args:
        results (`list[Result]`): Rows in the order of the report.
        folder (`Path`): Output folder; kept samples are read from its `samples/`.
    """
    points = pooled(results)
    write_text(folder / "summary.csv", summary(results))
    known = set.intersection(*(set(point.values) for point in points))
    qualities, diversities = axes(known, "quality"), axes(known, "diversity")
    if "quality" in qualities and points[0].omega is None:
        qualities = [key for key in qualities if key != "adherence"]  # equal to quality without a preference
    tables = report_tables(points, qualities, diversities)
    plots = write_plots(points, qualities, diversities, folder)
    page = Page("Quality and diversity", about(points), tables, kept_samples(results, folder), plots)
    write_text(folder / "report.html", page.html())
    write_text(folder / "report.md", page.markdown())


def report_tables(points: Sequence[Point], qualities: Sequence[str], diversities: Sequence[str]) -> list[Table]:
    """The table of all points, then the non-empty tables of comparisons."""
    pairs = [(quality, diversity) for quality in qualities for diversity in diversities]
    others = [
        *(fronts_table(points, *pair) for pair in pairs),
        *([lambda_table(points, [*qualities, *diversities])] if pairs else []),
        *([agreement_table(points, diversities)] if diversities else []),
        *claims_tables(points, qualities, diversities),
    ]
    return [points_table(points), *(table for table in others if table.rows)]


def kept_samples(results: Sequence[Result], folder: Path) -> list[PromptItems]:
    """The kept completions of all rows by prompt, as recorded in each row's folder."""
    prompts: dict[str, PromptItems] = {}
    for result in results:
        numbers: dict[str, int] = {}
        for clip in read_clips(folder / "samples" / result.samples):
            text = request_of(clip.prompt)
            of_prompt = prompts.setdefault(repr(clip.prompt), PromptItems(text))
            number = numbers[repr(clip.prompt)] = numbers.get(repr(clip.prompt), 0) + 1
            if number == 1:
                of_prompt.items.append(Item(result.name))
            of_prompt.items[-1].samples.append(_sample(clip, f"{result.name}, sample {number}: {text}", folder))
    return list(prompts.values())


def _sample(clip: Clip, label: str, folder: Path) -> Sample:
    if clip.is_text:
        return Sample(label, clip.text())
    sound, picture = (quote(file.relative_to(folder).as_posix()) for file in (clip.file, clip.spectrogram()))
    return Sample(label, None, sound, picture)


def request_of(prompt: Prompt) -> str:
    """A prompt as the heading of its completions: the text, or the last turn of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def about(points: Sequence[Point]) -> str:
    """Introduction of the report: how each number was measured."""
    first, samples = points[0], sorted({point.samples_per_prompt for point in points})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    parts = [
        f"{first.prompts} held-out prompts x {count} samples, seed {first.seed}; mean and 95 % "
        "bootstrap interval over prompts; where a point has several training seeds, Student's t interval over prompts "
        "and seeds."
    ]
    if "quality" in first.metrics:
        omega = first.omega
        parts.append(
            "Quality: text adherence." if omega is None else f"Quality: {omega:.4g} x adherence + preference."
        )
    if "diversity" in first.metrics:
        parts.append(
            "Diversity: mean cosine distance of the samples of a prompt; 0 if they are equal, and its upper bound is "
            "that of samples of different prompts."
        )
    if "frechet" in first.metrics:
        floor = first.metrics["frechet_floor"]["mean"]
        parts.append(
            "Fréchet distance: to held-out recordings under the judge; as many draws of their own normal distribution "
            f"score {floor:.3f}, for so few samples are biased upwards."
        )
    parts.append("Time per token: the first row's is 1; it tells little where other jobs ran beside it.")
    return " ".join(parts)


ABOUT_ROW = (
    "name", "strategy", "model", "guidance_scale", "early_steps", "early_guidance_scale", "temperature",
    "interpolation_weight", "diversity_coef", "training_seed", "checkpoint", "negative_prompt", "omega",
)  # fmt: skip


def summary(results: Sequence[Result]) -> str:
    """All rows as CSV: their settings, and mean, low and high of every metric."""
    keys = [one.key for one in in_order(key for row in results for key in row.metrics)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*ABOUT_ROW, *(f"{key}{end}" for key in keys for end in ("", "_low", "_high"))])
    for row in results:
        intervals = [row.metrics.get(key) for key in keys]
        ends = [(one["mean"], one["low"], one["high"]) if one else ("", "", "") for one in intervals]
        writer.writerow([*(getattr(row, name) for name in ABOUT_ROW), *(cell for end in ends for cell in end)])
    return file.getvalue()
