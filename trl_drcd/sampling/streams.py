"""
Streams: the interface between the decode loop and a model. They return hidden states for the prompts, then per step.

Letters: `R` rows in the batch (twice the sequences with guidance), `P` longest prompt, `K` codebooks, `H` hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from transformers import GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_drcd.guidance import left_pad
from trl_drcd.sampling.cache import preallocated_cache, preallocated_cross_cache
from trl_drcd.sampling.compiled import compiled_step, compiling, last_hidden_states, padded, rounded_up


class Stream(Protocol):
    """A batch of rows that are decoded together."""

    fixed_rows: bool
    """Whether all rows stay in the batch until the end: `keep` is not called by the loop."""

    def start(self) -> torch.Tensor:
        """Encode the prompts; returns the hidden states `(R, H)` that predict the first step."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed the tokens of a step, int64 `(R, K)`; returns the hidden states `(R, H)` that predict the next step."""

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the given rows, int64, in that order."""


def distinct_rows(rows: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """
    Deduplicate rows of token ids.

    Args:
        rows (`list[list[int]]`): `R` rows.

    Returns:
        `tuple`: The distinct rows in order of first appearance, and the index of each row among them, int64 `(R,)`.
    """
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(tuple(row), len(places)) for row in rows]
    return [list(row) for row in places], torch.tensor(index, dtype=torch.long)


def refusal(model: Any) -> str | None:
    """
    Why [`CausalStream`] cannot decode a causal LM and `generate` is used instead; `None` if it can.

    Args:
        model (`PreTrainedModel`): A causal LM without PEFT's wrapper.
    """
    name, backbone = type(model).__name__, model.base_model
    if cache_argument(backbone) is None or not model._supports_default_dynamic_cache():
        return f"{type(backbone).__name__} does not keep its past in a `Cache`"
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{name} overrides `prepare_inputs_for_generation`"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 needs all processes in every forward"
    return None


def cache_argument(backbone: Any) -> str | None:
    """Name of the cache argument of `forward`; transformers 5.24 renames it."""
    names = inspect.signature(backbone.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in names), None)


class CausalStream:
    """
    Decoding stream of a decoder-only transformer with left-padded prompts. Each distinct prompt is encoded once.

    Args:
        backbone (`PreTrainedModel`): Returns hidden states after the final norm; its [`refusal`] is `None`.
        prompt_ids (`list[list[int]]`): `R` non-empty rows.
        steps (`int`): Maximum number of completion tokens.

    Raises:
        ValueError: If a prompt is empty.
    """

    def __init__(self, backbone: Any, prompt_ids: list[list[int]], steps: int):
        if empty := [number for number, ids in enumerate(prompt_ids) if not len(ids)]:
            raise ValueError(f"`prompt_ids` must hold at least one token each, got none in row {empty[0]}")
        self.backbone = backbone
        different, index = distinct_rows(prompt_ids)
        ids, mask = left_pad(different, 0)
        self.ids, self.mask, self.index = (tensor.to(backbone.device) for tensor in (ids, mask, index))
        self.fixed_rows = compiling()
        self.forward: Callable[..., torch.Tensor] = partial(last_hidden_states, backbone)
        length = ids.shape[1] + steps
        self.capacity = rounded_up(length) if self.fixed_rows else length
        self.cache: Any = preallocated_cache(backbone.config, self.capacity)
        self.cache_argument = str(cache_argument(backbone))
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self.padded = self.fixed_rows or not bool(mask.all())

    def start(self) -> torch.Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(self.ids, self.mask, positions)
        room = self.capacity - self.ids.shape[1]
        self.positions, self.mask = positions[:, -1:], torch.nn.functional.pad(self.mask, (0, room), value=1)
        if len(self.index) != len(hidden):
            self.keep(self.index)
            hidden = hidden[self.index]
        self.length = self.ids.shape[1]
        if self.fixed_rows:
            self.forward, self.cache = compiled_step(self.backbone, self.cache)
        return hidden

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.length += 1
        self.positions = self.positions + 1
        # A static cache has a mask of all its positions, of which causal attention leaves out those to come
        return self._forward(tokens, self.mask if self.fixed_rows else self.mask[:, : self.length], self.positions)

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)  # every cache layer has this, for beam search
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.padded = self.fixed_rows or not bool(self.mask.all())

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, self.cache_argument: self.cache}
        inputs["attention_mask"] = mask if self.padded else None
        if self.takes_positions:
            inputs["position_ids"] = positions
        return self.forward(**inputs)


class CrossAttentionStream:
    """
    Decoding stream of a decoder that reads its prompts by cross-attention, which is computed once per distinct prompt.

    Args:
        decoder (`PreTrainedModel`): The decoder without its heads.
        condition (`dict`): Its `encoder_hidden_states` and `encoder_attention_mask` for the `U` distinct prompts.
        index (`torch.Tensor`): Index of each row's prompt, int64, shape `(R,)`.
        steps (`int`): Number of decoder steps.
    """

    def __init__(self, decoder: Any, condition: dict[str, torch.Tensor], index: torch.Tensor, steps: int):
        self.fixed_rows, self.decoder, self.index = compiling(), decoder, index
        self.condition = padded(condition) if self.fixed_rows else condition
        self.length = rounded_up(steps) if self.fixed_rows else steps
        self.cache: Any = preallocated_cross_cache(decoder.config, self.length)
        self.forward: Callable[..., torch.Tensor] = partial(last_hidden_states, decoder)

    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(R, H)` of the first step, computed once per distinct prompt: all its rows start alike."""
        hidden = self.read(ids)
        if len(self.index) != len(hidden):
            self.keep(self.index)
            hidden = hidden[self.index]
        if self.fixed_rows:
            self.forward, self.cache = compiled_step(self.decoder, self.cache)
        return hidden

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(R, H)` after a step's ids, in the decoder's layout."""
        return self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, **self.condition)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the given rows, int64, in that order."""
        self.cache.reorder_cache(rows)
        self.condition = {name: tensor[rows] for name, tensor in self.condition.items()}
