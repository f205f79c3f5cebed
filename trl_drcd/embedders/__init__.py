"""Embedding models E: what the diversity reward calls "similar" is what they place close to each other."""

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from trl_drcd.embedders.music import MusicEmbedder
    from trl_drcd.embedders.sentence import SentenceEmbedder

__all__ = ["Embedder", "MusicEmbedder", "SentenceEmbedder"]


class Embedder(Protocol):
    """
    E of Eq. (3) of https://huggingface.co/papers/2410.06084: called with a list, returns one vector per item.

    The items are strings for text, and `(waveform, sampling_rate)` pairs for audio (waveform float, 1-D; rate in Hz).
    The vectors have shape `(len(inputs), D)`, are finite, have a length above 0, and need not be normalised.
    """

    def __call__(self, inputs: list[Any], /) -> torch.Tensor: ...


def __getattr__(name: str) -> Any:
    # Lazily, so that a text-only installation does not load the audio models.
    if name == "MusicEmbedder":
        from trl_drcd.embedders.music import MusicEmbedder

        return MusicEmbedder
    if name == "SentenceEmbedder":
        from trl_drcd.embedders.sentence import SentenceEmbedder

        return SentenceEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
