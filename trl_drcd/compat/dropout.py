"""
transformers 5 and PEFT: dropout, and other randomness in training, which TRL's `disable_dropout_in_model` misses.

OPT, GPTBigCode, T5, MusicGen and others call `nn.functional.dropout` with a probability stored on a module or its
configuration; `attention_dropout` works the same way in every attention layer. If it stays on, the model in training
mode scores a different distribution from the one it sampled from. Adapters of PEFT keep probabilities in dictionaries.
Routers of mixtures of experts multiply their inputs by noise, or draw among experts that are nearly as good, where a
probability is called "jitter". `tests/families` shows which families need this.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig


def turn_off_dropout(model: torch.nn.Module) -> None:
    """
    Set every dropout probability of a model to 0, and turn off the noise of its routers.

    Covers the probability `p` of modules with "Dropout" in the name of their class or of one above it, and every
    number in (0, 1] that a module or its configuration stores in an attribute with "drop" in its name. A module with
    an attribute that has "jitter" in its name computes as in evaluation: its value can also be a threshold, which
    stays.

    Args:
        model (`nn.Module`): Modified in place, together with its configurations.
    """
    for module in model.modules():
        part: Any = module
        named = any("dropout" in kind.__name__.lower() for kind in type(module).__mro__)
        if named and isinstance(getattr(part, "p", None), int | float):
            part.p = 0.0
        _zero(module)
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_as_in_evaluation)
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            _zero_config(config)


def _as_in_evaluation(module: torch.nn.Module, _: object) -> None:
    """Before each forward: whoever sets a model's mode sets that of all of its modules."""
    module.training = False


def _zero(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" not in name.lower():
            continue
        if _is_probability(value):
            setattr(holder, name, 0.0)
        elif isinstance(value, dict):  # of each adapter
            value.update({key: 0.0 for key, one in value.items() if _is_probability(one)})


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _zero_config(config: PreTrainedConfig) -> None:
    _zero(config)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _zero_config(part)
