"""Optional dependencies: imported where they are used, with an error that names the extra that brings them."""

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """
    Import a module of an optional dependency.

    Args:
        module (`str`): Name to import, such as `"torchaudio.functional"`.
        extra (`str`): The extra of this distribution that installs it, such as `"audio"`.

    Returns:
        `types.ModuleType`: The imported module.

    Raises:
        ImportError: If the package is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, and something that it needs is not
        raise ImportError(f'{package} is needed here. Install it with: pip install "trl-drcd[{extra}]"') from error
