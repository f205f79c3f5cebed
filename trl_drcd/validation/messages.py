"""The language of errors: how a value stands in a message, whose fault it is, and how a program ends on one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def short_repr(value: object, length: int = 80) -> str:
    """A value as it stands in a message: its `repr`, one line, cut when it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def is_valid_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no unpaired surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@contextmanager
def prefix_errors(argument: str) -> Iterator[None]:
    """Puts the name of an argument before what is wrong with the folder that it names."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise _restated(error, f"`{argument}`: {error}") from error


@contextmanager
def rename_arguments(names: Mapping[str, str]) -> Iterator[None]:
    """
    Calls arguments in errors as the user calls them: a script's by those of the script, not by the trainer's.

    Args:
        names (`Mapping[str, str]`): Name of an argument, as it stands in backticks, to what stands there instead, such
            as `{"train_dataset": "dataset=prompts.jsonl"}`.
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
    """The same kind of error with another text; a kind that is made of more than a text becomes its parent."""
    kinds = (FileNotFoundError, TypeError, ValueError)
    return (type(error) if type(error) in kinds else next(k for k in kinds if isinstance(error, k)))(text)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line, without a traceback, where what it was given is wrong."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What a program that was run has printed stays as it is
        text = str(error) if isinstance(error, RuntimeError) else " ".join(str(error).split())
        raise SystemExit(f"{program}: error: {text}") from error
