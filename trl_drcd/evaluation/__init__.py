"""Evaluation after training; none of its metrics is used as a reward. The pipeline, one step per module:

arguments, strategies (rows) -> plan (digests) -> models, sampling -> judging, metrics -> results -> points, statistics
-> tables, plots, report.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_drcd.evaluation.fronts import hypervolume, pareto_front

__all__ = ["hypervolume", "pareto_front"]

_MODULES = {"hypervolume": "fronts", "pareto_front": "fronts"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
