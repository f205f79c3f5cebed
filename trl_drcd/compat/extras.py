"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

from importlib import import_module
from types import ModuleType

from trl_drcd.compat.torchaudio_wheel import torchaudio_problem


def require(module: str, extra: str) -> ModuleType:
    """
    Import a module of an optional dependency.

    Args:
        module (`str`): Name to import, such as `"torchaudio.functional"`.
        extra (`str`): The extra of this distribution that installs it, such as `"audio"`.

    Returns:
        `types.ModuleType`: The imported module.

    Raises:
        ImportError: If the package is not installed or cannot be used; the message gives the fix.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its own dependencies is missing
        if package == "torchaudio" and (problem := torchaudio_problem()):
            raise ImportError(f"torchaudio is needed here, and {problem}") from error
        raise ImportError(f'{package} is needed here. Install it with: pip install "trl-drcd[{extra}]"') from error
