"""Functions that are named, as `module.function`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def names_a_callable(name: str) -> bool:
    """Whether a name has the form `module.function`, and is not that of a file or folder."""
    return "." in name and all(part.isidentifier() for part in name.split(".")) and not Path(name).exists()


def load_callable(argument: str, name: str) -> Callable:
    """
    A function by its name, from an installed module or one in the current folder.

    Args:
        argument (`str`): What the user calls it, for the messages.
        name (`str`): `module.function`.

    Returns:
        `Callable`: What stands under that name in the module.

    Raises:
        ValueError: If there is no such module, nothing of that name in it, or it cannot be called.
    """
    where, form = f"`{argument}={name}`", "give `module.function`, of an installed module or of one in this folder"
    if not names_a_callable(name):
        raise ValueError(f"{where} is not the name of a function; {form}")
    module_name, _, attribute = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # behind what is installed, which nothing here replaces
    try:
        found = getattr(import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(f"{where}: there is no module `{error.name}`; {form}") from error
    if not callable(found):
        raise ValueError(f"{where}: the module has no function `{attribute}`; {form}")
    return found
