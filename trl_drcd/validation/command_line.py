"""Command lines, with the YAML file that they name: known arguments only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.yaml_files import read_yaml


def parse_command_line(parser: Any, argv: Sequence[str]) -> Any:
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
            raise ValueError(f"`config={file}` has an unknown key `{short_repr(name)[1:-1]}`; {_instead(name, known)}")
        parser.set_defaults_with_config(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ValueError(f"unknown argument {short_repr(unknown[0])}; {_instead(unknown[0], flags)}")
    return tuple(parsed)


def _instead(name: str, known: Iterable[str]) -> str:
    """The known name that is closest, as a hint."""
    close = get_close_matches(name, known, 1)
    return f"do you mean `{close[0]}`?" if close else "`--help` lists what there is"
