"""Embedding models E: what the diversity reward calls "similar" is what they place close to each other."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from trl_drcd.embedders.descriptors import MusicDescriptors
    from trl_drcd.embedders.music import MusicEmbedder
    from trl_drcd.embedders.sentence import SentenceEmbedder

__all__ = ["Embedder", "MusicDescriptors", "MusicEmbedder", "SentenceEmbedder"]


class Embedder(Protocol):
    """
    E of Eq. (3) of https://huggingface.co/papers/2410.06084: called with a list, returns one vector per item.

    The items are strings for text, and `(waveform, sampling_rate)` pairs for audio (waveform float, 1-D; rate in Hz).
    The vectors have shape `(len(inputs), D)`, are finite, have a length above 0, and need not be normalised.
    """

    def __call__(self, inputs: list[Any], /) -> torch.Tensor: ...


# Loaded when asked for, so that a text-only installation does not load the audio models, nor the reverse.
_MODULES = {"MusicDescriptors": "descriptors", "MusicEmbedder": "music", "SentenceEmbedder": "sentence"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
