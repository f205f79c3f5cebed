"""Functions given by their import path, `module.function`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def names_a_callable(name: str) -> bool:
    """Whether a name has the form `module.function` and is not an existing file or folder."""
    return "." in name and all(part.isidentifier() for part in name.split(".")) and not Path(name).exists()


def load_callable(argument: str, name: str) -> Callable:
    """
    Import a function from an installed module or from a module in the current folder.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        name (`str`): `module.function`.

    Returns:
        `Callable`: The function.

    Raises:
        ValueError: If the module does not exist, or has no callable of that name.
    """
    where, form = f"`{argument}={name}`", "give `module.function`, of an installed module or of one in this folder"
    if not names_a_callable(name):
        raise ValueError(f"{where} is not the name of a function; {form}")
    module_name, _, attribute = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that it cannot shadow installed modules
    try:
        found = getattr(import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports is missing
        raise ValueError(f"{where}: there is no module `{error.name}`; {form}") from error
    if not callable(found):
        raise ValueError(f"{where}: the module has no function `{attribute}`; {form}")
    return found
