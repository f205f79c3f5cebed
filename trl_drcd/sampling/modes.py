"""What a model is while it samples: in evaluation mode, on few threads, with weights cast or packed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trl_drcd.compat.threads import decoding_threads
from trl_drcd.sampling.compiled import compiling
from trl_drcd.sampling.packed import packed_weights


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """
    Put a model in evaluation mode; on exit restore the mode of each module.

    In training mode, gradient checkpointing would disable the cache, and dropout would change the distribution.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def cast_once(model: torch.nn.Module, device_type: str) -> Iterator[None]:
    """
    Make autocast cache the casts of frozen weights, which it would otherwise repeat for every token.

    Autocast caches the cast of a float32 weight until its context ends, but only if the weight requires a gradient, so
    this sets `requires_grad` temporarily. Use it under `torch.no_grad()`.
    """
    frozen = []
    if torch.is_autocast_enabled(device_type):
        frozen = [p for p in model.parameters() if p.dtype == torch.float32 and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def sampling_mode(model: torch.nn.Module, own: torch.nn.Module) -> Iterator[None]:
    """
    All that makes a model ready to sample, without gradients; on exit it is as it was.

    Args:
        model (`torch.nn.Module`): With or without adapters.
        own (`torch.nn.Module`): The transformers model in it.
    """
    device = next(own.parameters()).device.type
    with torch.no_grad(), evaluating(model), decoding_threads(own), cast_once(own, device):
        if compiling():  # a compiled step has its own way with weights
            yield
            return
        with packed_weights(own):
            yield
