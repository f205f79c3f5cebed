"""Numbers compared with their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Range(NamedTuple):
    """
    The numbers that an argument may be; always finite.

    Args:
        least (`float`): The smallest one.
        above (`bool`): Whether `least` itself is too small.
        hint (`str`): What is more to say about it.
    """

    least: float
    above: bool = False
    hint: str = ""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value > self.least if self.above else value >= self.least

    def in_words(self, value: object) -> str:
        """What is allowed, for the message about `value`."""
        bound = f"{'above' if self.above else 'at least'} {self.least:g}"
        finite = "finite and " if isinstance(value, float) else ""
        return f"{finite}{bound}{f' ({self.hint})' if self.hint else ''}"


def check_ranges(arguments: object, ranges: Mapping[str, Range]) -> None:
    """
    Compare attributes with their ranges; `None` is left alone.

    Args:
        arguments (`object`): Whose attributes are compared.
        ranges (`Mapping[str, Range]`): Name of an attribute to what it may be.

    Raises:
        ValueError: At the first number out of its range; the message names it.
    """
    for name, allowed in ranges.items():
        value = getattr(arguments, name)
        if value is not None and value not in allowed:
            raise ValueError(f"`{name}` must be {allowed.in_words(value)}, got {value}")
