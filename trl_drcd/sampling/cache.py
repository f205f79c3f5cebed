"""A cache of keys and values that is allocated once, for any model of transformers that takes a `Cache`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """
    Keys and values of a layer of full attention, written in place and returned as views.

    transformers' own layer concatenates at each token, that is, copies everything that is there.

    Args:
        length (`int`): Positions that it holds, prompt and completion.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates, once the shape and the dtype of keys and values are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._storage = tuple(self._empty(states, len(states)) for states in (key_states, value_states))
        self._show(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Appends new positions.

        Args:
            key_states, value_states (`torch.Tensor`): Shape `(B, heads, positions, size)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: All keys and values so far: views, valid until the next call.

        Raises:
            ValueError: If there is no room left.
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
        """Keeps the given rows, int64 `(rows,)`, in that order; a row may come more than once."""
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
        """[`reorder_cache`] by another name."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
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
    The cache that transformers makes for a model, its layers of full attention allocated once.

    Sliding windows, linear attention and what mixes them keep their own layers, whose size does not grow.

    Args:
        config (`PreTrainedConfig`): The model's.
        length (`int`): Positions of the longest sequence.

    Returns:
        `DynamicCache`: Empty.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def preallocated_cross_cache(config: PreTrainedConfig, length: int) -> EncoderDecoderCache:
    """[`preallocated_cache`] for a decoder with cross-attention, whose keys and values are computed once and kept."""
    return EncoderDecoderCache(preallocated_cache(config, length), DynamicCache(config=config))
