"""
transformers 5: dropout that is no `nn.Dropout`, which TRL's `disable_dropout_in_model` does not see.

OPT, GPTBigCode, T5, MusicGen and others call `nn.functional.dropout` with a probability that a module or its
configuration holds, and every attention has an `attention_dropout` of that kind. With it a model in training mode
scores another distribution than the one that sampled. `tests/families` says which families need this.
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
    Sets every probability of dropout in a model to 0: `nn.Dropout`, and numbers in (0, 1] that modules and their
    configurations have under a name with "drop" in it.

    Args:
        model (`nn.Module`): Changed in place, its configurations too.
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
