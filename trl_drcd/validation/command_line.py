"""Parse the command line and the YAML file of `--config`; unknown arguments are errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.yaml_files import read_yaml

OF_ACCELERATE = ("num_processes", "num_machines", "mixed_precision", "dynamo_backend", "multi_gpu", "config_file")


def refuse_bare_file(argv: Sequence[str]) -> None:
    """
    Refuse a YAML file as the first word.

    Raises:
        ValueError: If it is one; the message says how it is given.
    """
    if argv and argv[0].lower().endswith((".yaml", ".yml")):
        raise ValueError(
            f"unknown argument {short_repr(argv[0])}; a file of arguments is given as `--config {argv[0]}`"
        )


def parse_command_line(parser: Any, argv: Sequence[str]) -> Any:
    """
    Parse like `TrlParser.parse_args_and_config`, but read the file with [`read_yaml`].

    Arguments of the command line override those of the file given by `--config`. The key `env`, from which TRL sets
    environment variables, is refused: a config file from someone else could redirect a logger, and so the user's API
    key, to another server.

    Args:
        parser (`TrlParser`): Parser of dataclasses.
        argv (`Sequence[str]`): The command line, without the program name.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        FileNotFoundError: See [`read_yaml`].
        ValueError: See [`read_yaml`]; or if a key or an argument is unknown, or the file has the key `env`.
    """
    words, file = [], None
    given = iter(argv)
    for word in given:
        if word.partition("=")[0] == "--config":
            file = word.partition("=")[2] or next(given, "")
        else:
            words.append(word)
    refuse_bare_file(argv)
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
    """A hint with the closest known name."""
    if name.lstrip("-").partition("=")[0] in OF_ACCELERATE:
        return "it is one of `accelerate launch`, which starts a training in other ways (docs/many_gpus.md)"
    close = get_close_matches(name, known, 1)
    return f"did you mean `{close[0]}`?" if close else "`--help` lists all arguments"
