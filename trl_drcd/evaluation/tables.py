"""Cells of tables: numbers with their intervals, and what these say."""

from __future__ import annotations


def formatted(interval: dict[str, float], digits: int = 3) -> str:
    """`mean [low, high]`; what rounds to zero has no sign."""
    mean, low, high = (f"{interval[key]:z.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def verdict(interval: dict[str, float], above: str, below: str) -> str:
    """`above` where the whole interval lies above zero, `below` where it lies below, else `undecided`."""
    if interval["low"] > 0:
        return above
    return below if interval["high"] < 0 else "undecided"
