"""Arguments from outside, a command line or a YAML file: read without running or expanding anything, and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 100_000
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}
LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def shown(value: Any, length: int = 80) -> str:
    """A value as it stands in a message: its `repr`, one line, cut when it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


# ---------------------------------------------------------------- types


def check_types(arguments: Any) -> None:
    """
    Compare the fields of a dataclass with their annotations, where these are made of numbers, texts, truth values,
    lists of them, and `None`; other fields are left alone.

    Raises:
        TypeError: At the first value of another type; the message names the field.
    """
    hints = get_type_hints(type(arguments))
    for field in fields(arguments):
        kinds = _kinds(hints[field.name])
        if kinds and not any(_is(getattr(arguments, field.name), kind) for kind in kinds):
            wanted = " or ".join(map(_in_words, kinds))
            raise TypeError(f"`{field.name}` must be {wanted}, got {shown(getattr(arguments, field.name))}")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of an annotation; none if one of them is not simple."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    simple = all(
        kind in IN_WORDS or (get_origin(kind) is list and all(part in LISTS for part in get_args(kind)))
        for kind in kinds
    )
    return kinds if simple else []


def _in_words(kind: Any) -> str:
    return LISTS[get_args(kind)[0]] if get_origin(kind) is list else IN_WORDS[kind]


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is str:  # folders are often given as paths
        return isinstance(value, str | os.PathLike)
    return isinstance(value, kind)


# ---------------------------------------------------------------- YAML


def read_yaml(file: str | Path) -> dict[str, Any]:
    """
    The mapping in a YAML file: plain values only, as with `yaml.safe_load`, and of a bounded size.

    Anchors are counted as often as they are used, before any of them is expanded, so that a few lines cannot become
    gigabytes.

    Args:
        file (`str` or `Path`): At most 1 MiB of UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping of plain values, repeats a key, or is too large.
    """
    path = Path(file)
    where = f"`config={file}`"
    if not path.is_file():
        raise FileNotFoundError(f"{where} is no file; give a YAML file, such as those in recipes/")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{where} has {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count(root, {}, where)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{where} is no YAML of plain values: {problem}{at}; mend that line") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; a configuration is a mapping of a few levels") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must hold a mapping, lines of `name: value`, got {shown(values)}")
    return values


def _count(node: yaml.Node, counted: dict[int, int], where: str) -> int:
    """Nodes below and with this one, each anchor as often as it is used."""
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise ValueError(f"{where} has an anchor inside itself (line {node.start_mark.line + 1}); write it out")
        return counted[id(node)]
    counted[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            line = node.start_mark.line + 1
            raise ValueError(f"{where} has `{repeated}` twice in the mapping of line {line}; keep one")
        total += sum(_count(part, counted, where) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, counted, where) for part in node.value)
    if total > MAX_YAML_NODES:
        raise ValueError(
            f"{where} has more than {MAX_YAML_NODES} values when its anchors are expanded; write out what is meant"
        )
    counted[id(node)] = total
    return total


# ---------------------------------------------------------------- command lines


def parse(parser: Any, argv: Sequence[str]) -> Any:
    """
    What `TrlParser.parse_args_and_config` does, with [`read_yaml`]: the command line before the file of `--config`.

    Environment variables, which TRL takes from the key `env`, are refused: a file that somebody sends could point
    a logger, and with it the user's key, to another server.

    Args:
        parser (`TrlParser`): Of dataclasses.
        argv (`Sequence[str]`): The command line.

    Returns:
        `tuple`: The dataclasses.

    Raises:
        FileNotFoundError, ValueError: As [`read_yaml`] does, or if a key is unknown.
    """
    words, file = [], None
    given = iter(argv)
    for word in given:
        if word.partition("=")[0] == "--config":
            file = word.partition("=")[2] or next(given, "")
        else:
            words.append(word)
    if file is not None:
        values = read_yaml(file)
        if "env" in values:
            raise ValueError(f"`config={file}` has `env`; set environment variables in the shell that starts this")
        known = {action.dest for action in parser._actions}
        for name in values.keys() - known:
            raise ValueError(f"`config={file}` has an unknown key `{shown(name)[1:-1]}`; {_instead(name, known)}")
        parser.set_defaults_with_config(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ValueError(f"unknown argument {shown(unknown[0])}; {_instead(unknown[0], flags)}")
    return tuple(parsed)


def _instead(name: str, known: Iterable[str]) -> str:
    """The known name that is closest, as a hint."""
    close = get_close_matches(name, known, 1)
    return f"do you mean `{close[0]}`?" if close else "`--help` lists what there is"


@contextmanager
def blaming(argument: str) -> Iterator[None]:
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
