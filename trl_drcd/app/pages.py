"""HTML of the app and of the static page; Jinja escapes all text."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trl_drcd.evaluation.report import Item, PromptItems, Sample

TEMPLATES = Environment(
    loader=PackageLoader("trl_drcd.app"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def asset(name: str) -> str:
    """Content of a file in `templates/`."""
    return files("trl_drcd.app").joinpath("templates", name).read_text(encoding="utf-8")


def render(template: str, **values: object) -> str:
    """Render a template with these values."""
    return TEMPLATES.get_template(template).render(**values)


def listening(prompts: Sequence[PromptItems]) -> str:
    """Render prompts, each with its strategies side by side."""
    return render("prompts.html.j2", prompts=prompts)


def column(heading: str, cost: str, samples: Sequence[Sample]) -> str:
    """Render a column of the tab Play: heading, cost and samples."""
    return render("column.html.j2", heading=heading, cost=cost, item=Item(heading, list(samples)))


def notice(text: str, kind: str = "info") -> str:
    """Render a message; `kind` is `info` or `error` (announced immediately by screen readers)."""
    return render("notice.html.j2", text=text, kind=kind)


def side(name: str, clips: Sequence[dict[str, Any]]) -> str:
    """Render one side of a blind comparison; clips have `text`, or `label`, `sound`, `played_url` and `played`."""
    return render("side.html.j2", name=name, clips=clips)
