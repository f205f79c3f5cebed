"""Tables: numbers with their intervals, what these say, Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def formatted(interval: dict[str, float], digits: int = 3) -> str:
    """`mean [low, high]`; what rounds to zero has no sign."""
    mean, low, high = (f"{interval[key]:z.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def verdict(interval: dict[str, float], above: str, below: str) -> str:
    """`above` where the whole interval lies above zero, `below` where it lies below, else `undecided`."""
    if interval["low"] > 0:
        return above
    return below if interval["high"] < 0 else "undecided"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column names its rows, no two alike."""
    table = markdown_table({row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows})
    return table.replace("| |", f"| {header[0]} |", 1)


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of named rows, numbers with 4 digits, texts as they are; the columns are the first row's."""
    columns = list(next(iter(rows.values()), {}))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(_cell(text) for text in (name, *texts)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in one cell of a Markdown table, which would take a part of it for markup."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
