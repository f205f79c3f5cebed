"""
transformers 5: functional dropout, which TRL's `disable_dropout_in_model` misses.

OPT, GPTBigCode, T5, MusicGen and others call `nn.functional.dropout` with a probability stored on a module or its
configuration; `attention_dropout` works the same way in every attention layer. If it stays on, the model in training
mode scores a different distribution from the one it sampled from. `tests/families` shows which families need this.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

DROPOUTS = (
    torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)  # fmt: skip


def turn_off_dropout(model: torch.nn.Module) -> None:
    """
    Set every dropout probability of a model to 0.

    Covers the `nn.Dropout` modules and every number in (0, 1] that a module or its configuration stores in an
    attribute with "drop" in its name.

    Args:
        model (`nn.Module`): Modified in place, together with its configurations.
    """
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.0
        _zero(module)
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            _zero_config(config)


def _zero(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and "drop" in name.lower() and 0 < value <= 1:
            setattr(holder, name, 0.0)


def _zero_config(config: PreTrainedConfig) -> None:
    _zero(config)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _zero_config(part)
