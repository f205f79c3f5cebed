"""The language of errors: how a value stands in a message, whose fault it is, and how a program ends on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def short_repr(value: Any, length: int = 80) -> str:
    """A value as it stands in a message: its `repr`, one line, cut when it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


@contextmanager
def prefix_errors(argument: str) -> Iterator[None]:
    """Puts the name of an argument before what is wrong with the folder that it names."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"`{argument}`: {error}") from error


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line, without a traceback, where what it was given is wrong."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What a program that was run has printed stays as it is
        text = str(error) if isinstance(error, RuntimeError) else " ".join(str(error).split())
        raise SystemExit(f"{program}: error: {text}") from error
