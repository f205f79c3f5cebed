"""Tables of formatted text: numbers with intervals, verdicts, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from trl_drcd.markdown import markdown_cell, markdown_table, markdown_text

if TYPE_CHECKING:
    from trl_drcd.evaluation.statistics import Interval

__all__ = ["Table", "formatted", "markdown", "markdown_table", "markdown_text", "verdict"]


@dataclass(frozen=True)
class Table:
    """
    A table of formatted cells.

    Args:
        heading (`str`): Heading above the table; may be empty.
        header (`Sequence[str]`): Column names; the first column holds the row names.
        rows (`Sequence[Sequence[str]]`): Cells, row by row.
    """

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def formatted(interval: Interval, digits: int = 3) -> str:
    """`mean [low, high]`, or the mean alone if its interval has no ends; a value that rounds to zero has no sign."""
    mean, low, high = (f"{end:z.{digits}f}" for end in (interval["mean"], interval["low"], interval["high"]))
    return f"{mean} [{low}, {high}]" if isfinite(interval["low"]) else f"{mean} (no interval)"


def verdict(interval: Interval, above: str, below: str) -> str:
    """`above` if the whole interval lies above zero, `below` if below zero, else `undecided`."""
    if interval["low"] > 0:
        return above
    return below if interval["high"] < 0 else "undecided"


def markdown(table: Table) -> str:
    """Render a table in Markdown, without its heading; row names must be unique."""
    rows = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    return markdown_table(rows).replace("| |", f"| {markdown_cell(table.header[0])} |", 1)
