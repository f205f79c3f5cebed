"""Range checks of numeric arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Range(NamedTuple):
    """
    Allowed values of a numeric argument: finite, and at least (or above) a bound.

    Args:
        least (`float`): Lower bound.
        above (`bool`): Whether the bound itself is excluded.
        hint (`str`): Addition to the error message.
    """

    least: float
    above: bool = False
    hint: str = ""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value > self.least if self.above else value >= self.least

    def in_words(self, value: object) -> str:
        """The allowed values, as text for the error message about `value`."""
        bound = f"{'above' if self.above else 'at least'} {self.least:g}"
        finite = "finite and " if isinstance(value, float) else ""
        return f"{finite}{bound}{f' ({self.hint})' if self.hint else ''}"


def check_ranges(arguments: object, ranges: Mapping[str, Range]) -> None:
    """
    Check attributes against their ranges. `None` is always allowed.

    Args:
        arguments (`object`): Object with the attributes.
        ranges (`Mapping[str, Range]`): Name of an attribute to its allowed range.

    Raises:
        ValueError: At the first value out of its range; the message names the attribute.
    """
    for name, allowed in ranges.items():
        value = getattr(arguments, name)
        if value is not None and value not in allowed:
            raise ValueError(f"`{name}` must be {allowed.in_words(value)}, got {value}")
