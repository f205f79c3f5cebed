"""Tables of texts: numbers with their intervals, what these say, Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.evaluation.statistics import Interval


@dataclass(frozen=True)
class Table:
    """
    A table of texts.

    Args:
        heading (`str`): Above it; may be empty.
        header (`Sequence[str]`): Of its columns; the first column names the rows.
        rows (`Sequence[Sequence[str]]`): Its cells.
    """

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def formatted(interval: Interval, digits: int = 3) -> str:
    """`mean [low, high]`; what rounds to zero has no sign."""
    mean, low, high = (f"{end:z.{digits}f}" for end in (interval["mean"], interval["low"], interval["high"]))
    return f"{mean} [{low}, {high}]"


def verdict(interval: Interval, above: str, below: str) -> str:
    """`above` where the whole interval lies above zero, `below` where it lies below, else `undecided`."""
    if interval["low"] > 0:
        return above
    return below if interval["high"] < 0 else "undecided"


def markdown(table: Table) -> str:
    """A table in Markdown, without its heading; no two rows have the same name."""
    rows = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    return markdown_table(rows).replace("| |", f"| {_cell(table.header[0])} |", 1)


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of named rows, numbers with 4 digits, texts as they are; the columns are the first row's."""
    columns = list(next(iter(rows.values()), {}))
    lines = ["| | " + " | ".join(columns) + " |" if columns else "| |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(_cell(text) for text in (name, *texts)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in one cell of a Markdown table, which would take a part of it for markup."""
    safe = html.escape(text, quote=False).replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
    return " ".join(safe.split())


def markdown_text(text: str) -> str:
    """A text on one line of Markdown, shown letter by letter: no markup, no link, no HTML."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~<>&:@])", r"\\\1", " ".join(text.split()))
