"""Tables: numbers with their intervals, what these say, Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from trl_drcd._run import markdown_table


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
