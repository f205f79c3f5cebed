"""
Merging: `(1 - lambda) * theta_q + lambda * theta_d`, Eq. (6) of https://huggingface.co/papers/2410.06084.

`interpolate_checkpoints` and `merge_with_mergekit` write full checkpoints, `interpolate_adapters` writes LoRA
adapters, and `set_interpolation_weight` sets lambda of a model in memory. All take any number of models with weights
that sum to 1. `load_adapter_model` loads an adapter with its own generation config.
"""

from trl_drcd.merging.adapters import interpolate_adapters
from trl_drcd.merging.checkpoints import interpolate_checkpoints
from trl_drcd.merging.in_memory import hold_checkpoints, set_interpolation_weight
from trl_drcd.merging.loading import load_adapter_model
from trl_drcd.merging.mergekit import merge_with_mergekit

__all__ = [
    "hold_checkpoints",
    "interpolate_adapters",
    "interpolate_checkpoints",
    "load_adapter_model",
    "merge_with_mergekit",
    "set_interpolation_weight",
]
