"""Check the values of dataclass fields against their annotations."""

from __future__ import annotations

import os
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl_drcd.validation.messages import short_repr

IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}
LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def check_types(arguments: Any) -> None:
    """
    Check the fields of a dataclass against their annotations.

    Only annotations made of `int`, `float`, `bool`, `str`, lists of these and `None` are checked.

    Args:
        arguments (`Any`): Instance of a dataclass.

    Raises:
        TypeError: At the first field whose value has the wrong type; the message names the field.
    """
    hints = get_type_hints(type(arguments))
    for field in fields(arguments):
        kinds = _kinds(hints[field.name])
        if kinds and not any(_is(getattr(arguments, field.name), kind) for kind in kinds):
            wanted = " or ".join(map(_in_words, kinds))
            raise TypeError(f"`{field.name}` must be {wanted}, got {short_repr(getattr(arguments, field.name))}")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of an annotation; empty if one of them is not checked here."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    simple = all(
        kind in IN_WORDS or (get_origin(kind) is list and all(part in LISTS for part in get_args(kind)))
        for kind in kinds
    )
    return kinds if simple else []


def _in_words(kind: Any) -> str:
    return LISTS[get_args(kind)[0]] if get_origin(kind) is list else IN_WORDS[kind]


def _is(value: object, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is str:  # folders are often given as `Path`
        return isinstance(value, str | os.PathLike)
    return isinstance(value, kind)
