"""A key-value cache that is allocated once, for any transformers model that takes a `Cache`."""

from __future__ import annotations

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """
    Keys and values of a full-attention layer, written in place and returned as views.

    transformers' own layer concatenates at each token, which copies the whole cache.

    Args:
        length (`int`): Capacity in positions, prompt and completion together.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the storage, given the shape and dtype of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._storage = tuple(self._empty(states, len(states)) for states in (key_states, value_states))
        self._show(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append new positions.

        Args:
            key_states, value_states (`torch.Tensor`): Shape `(B, heads, positions, size)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: All keys and values so far: views, valid until the next call.

        Raises:
            ValueError: If the cache is full.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), key_states.shape[-2]
        if start + new > self.length:
            raise ValueError(f"the cache has room for {self.length} positions, got {start + new}")
        for buffer, states in zip(self._storage, (key_states, value_states), strict=True):
            buffer.narrow(2, start, new).copy_(states)
        return self._show(start + new)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the given rows, int64 `(rows,)`, in that order; a row may be repeated."""
        if not self.is_initialized:
            return
        filled, rows = self.get_seq_length(), beam_idx.to(self.device)
        kept = []
        for buffer in self._storage:
            kept.append(self._empty(buffer, len(rows)))
            kept[-1].narrow(2, 0, filled).copy_(buffer.narrow(2, 0, filled)[rows])
        self._storage = tuple(kept)
        self._show(filled)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Same as [`reorder_cache`]."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self._storage[0]), device=self.device).repeat_interleave(repeats))

    def _empty(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        return like.new_empty(rows, like.shape[1], self.length, like.shape[3])

    def _show(self, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer.narrow(2, 0, filled) for buffer in self._storage)
        self.keys, self.values = keys, values
        return keys, values


def preallocated_cache(config: PreTrainedConfig, length: int) -> DynamicCache:
    """
    The cache that transformers creates for a model, with preallocated full-attention layers.

    Layers of sliding-window and linear attention stay as they are, since their size is bounded.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        length (`int`): Positions of the longest sequence.

    Returns:
        `DynamicCache`: An empty cache.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def preallocated_cross_cache(config: PreTrainedConfig, length: int) -> EncoderDecoderCache:
    """[`preallocated_cache`] for a decoder with cross-attention, whose keys and values are computed once and kept."""
    return EncoderDecoderCache(preallocated_cache(config, length), DynamicCache(config=config))
