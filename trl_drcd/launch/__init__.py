"""
Building blocks of training scripts, for the scripts of this package and for yours.

In the order of use: parse arguments ([`~trl_drcd.launch.arguments.parse_training_arguments`]), load prompts
([`~trl_drcd.launch.parts.load_datasets`]) and the embedder ([`~trl_drcd.launch.parts.load_embedder`]), create the
trainer ([`~trl_drcd.launch.training.make_trainer`]), train and save
([`~trl_drcd.launch.training.train_and_save`]). `trl_drcd/scripts/train_text.py` is a complete example.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.launch.arguments import PromptArguments, parse_training_arguments
    from trl_drcd.launch.parts import load_datasets, load_embedder, load_part, load_rewards
    from trl_drcd.launch.processes import end_on_signals, run_job
    from trl_drcd.launch.samples import write_samples
    from trl_drcd.launch.training import make_trainer, train_and_save

__all__ = [
    "PromptArguments",
    "end_on_signals",
    "load_datasets",
    "load_embedder",
    "load_part",
    "load_rewards",
    "make_trainer",
    "parse_training_arguments",
    "run_job",
    "train_and_save",
    "write_samples",
]

# Imported lazily: starting a job does not need torch
_MODULES = {
    "PromptArguments": "arguments",
    "end_on_signals": "processes",
    "load_datasets": "parts",
    "load_embedder": "parts",
    "load_part": "parts",
    "load_rewards": "parts",
    "make_trainer": "training",
    "parse_training_arguments": "arguments",
    "run_job": "processes",
    "train_and_save": "training",
    "write_samples": "samples",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
