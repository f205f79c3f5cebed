"""What is measured after training; none of it is ever a reward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.evaluation.fronts import hypervolume, pareto_front

__all__ = ["hypervolume", "pareto_front"]

_MODULES = {"hypervolume": "fronts", "pareto_front": "fronts"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
