"""Read `allowed_token_ids`: numbers and names of tokens, and ranges of them, before a tokenizer is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from trl_drcd.validation.messages import short_repr

EXAMPLE = 'give ids, ranges with both ends, or names of tokens, such as ["32..1055", "<|audio_0|>..<|audio_9|>", "2"]'


def as_entries(given: object) -> list[str] | None:
    """
    `allowed_token_ids` as a list of texts, each a token, or a range of tokens `first..last`, both ends included.

    A token is given by its id or by its name. Consecutive ids become one range.

    Args:
        given (`list`, `range`, `str`, `int` or `None`): Numbers and texts.

    Returns:
        `list[str]`, or `None` if `given` is `None`.

    Raises:
        TypeError: If it is not a list of numbers and texts.
        ValueError: If it is empty, or an id is below 0.
    """
    if given is None:
        return None
    if isinstance(given, str | Integral):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, dict | bytes):
        raise TypeError(f"`allowed_token_ids` must be a list, got {short_repr(given)}; {EXAMPLE}")
    entries: list[str] = []
    first = last = -1  # of the run of numbers that is being read
    for item in [*given, None]:
        if isinstance(item, Integral) and not isinstance(item, bool):
            if item < 0:
                raise ValueError(f"`allowed_token_ids` must be at least 0, got {item}; {EXAMPLE}")
            if first >= 0 and item == last + 1:
                last = int(item)
                continue
        elif item is not None and not isinstance(item, str):
            raise TypeError(f"`allowed_token_ids` must hold numbers or texts, got {short_repr(item)}; {EXAMPLE}")
        if first >= 0:
            entries.append(str(first) if first == last else f"{first}..{last}")
            first = -1
        if isinstance(item, str):
            entries.append(item.strip())
        elif item is not None:
            first = last = int(item)
    if not entries or not all(entries):
        raise ValueError(f"`allowed_token_ids` must not be empty, got {short_repr(entries)}; {EXAMPLE}")
    return entries
