"""Helpers for error messages: formatting of values, names of arguments, and one-line errors of programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OF_THE_INPUT = (ImportError, OSError, RuntimeError, TypeError, ValueError)


def short_repr(value: object, length: int = 80) -> str:
    """The `repr` of a value in one line, cut after `length` characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def is_valid_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, that is, has no unpaired surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@contextmanager
def prefix_errors(argument: str) -> Iterator[None]:
    """Prefix the message of a `FileNotFoundError` or `ValueError` with the name of an argument."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise _restated(error, f"`{argument}`: {error}") from error


@contextmanager
def rename_arguments(names: Mapping[str, str]) -> Iterator[None]:
    """
    Replace names of arguments in error messages, such as the trainer's by the script's.

    Args:
        names (`Mapping[str, str]`): Name of an argument, as written in backticks in a message, to its replacement,
            such as `{"train_dataset": "dataset=prompts.jsonl"}`.
    """
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        text = str(error)
        for name, new in names.items():
            text = re.sub(f"`{name}(?=[`=])", lambda _, new=new: f"`{new}", text)  # type: ignore[misc]
        if text == str(error):
            raise
        raise _restated(error, text) from error


def _restated(error: Exception, text: str) -> Exception:
    """The same type of error with another text; a subclass becomes its base, as it may take other arguments."""
    kinds = (FileNotFoundError, TypeError, ValueError)
    return (type(error) if type(error) in kinds else next(k for k in kinds if isinstance(error, k)))(text)


@contextmanager
def one_line_errors(program: str, kinds: tuple[type[Exception], ...] = OF_THE_INPUT) -> Iterator[None]:
    """Exit the program with a one-line message instead of a traceback on errors of these kinds."""
    try:
        yield
    except kinds as error:
        # A `RuntimeError` quotes the output of another program: keep its lines
        text = str(error) if isinstance(error, RuntimeError) else " ".join(str(error).split())
        raise SystemExit(f"{program}: error: {text}") from error
