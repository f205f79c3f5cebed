"""
MusicGen in TRL 1.16 and transformers 5: `config.get_text_config()` is ambiguous, and TRL takes its processor for a
vision model's.

This can be removed once `tests/test_musicgen.py::test_trl_alone_fails_on_musicgen` fails.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer, GenerationConfig, MusicgenConfig, ProcessorMixin
from transformers.models.musicgen.modeling_musicgen import MusicgenSinusoidalPositionalEmbedding


class StaticPositions(MusicgenSinusoidalPositionalEmbedding):
    """
    MusicGen's table of positions, which grows when it is too short: a comparison that the length of a static cache, a
    tensor, makes anew in each step, on a GPU by waiting for it.
    """

    def forward(self, input_ids: torch.Tensor, past_key_values_length: Any = 0) -> torch.Tensor:
        """The rows of the positions, `(S, H)`; with a tensor the table must be long enough."""
        if not isinstance(past_key_values_length, torch.Tensor):
            return super().forward(input_ids, past_key_values_length)
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device) + past_key_values_length
        return self.weights.index_select(0, positions).detach()


def hold_positions(decoder: Any, length: int) -> None:
    """Make the table of a MusicGen's decoder long enough for a static cache, and a step without a comparison."""
    table = decoder.embed_positions
    if len(table.weights) < length:
        table.make_weights(length, table.embedding_dim)
    if type(table) is MusicgenSinusoidalPositionalEmbedding:
        table.__class__ = StaticPositions


class MusicgenInTRL:
    """See [`~trl_drcd.compat.family_hooks.FamilyInTRL`]."""

    @staticmethod
    def processing_class(model: Any, given: object, revision: str | None = None) -> Any:
        """Return the T5 tokenizer: TRL would take MusicGen's processor for a vision model's."""
        if given is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            given = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        return given.tokenizer if isinstance(given, ProcessorMixin) else given

    @staticmethod
    @contextmanager
    def patched() -> Iterator[None]:
        """
        Make `config.get_text_config()` return a copy of the decoder's configuration.

        The original raises, because a model with both a text encoder and a decoder is ambiguous. A copy, because TRL
        and transformers write the tokenizer's pad and eos ids to the result, and these are not the decoder's ids.
        """
        own = MusicgenConfig.get_text_config

        def text_config(self: Any, decoder: Any = None, encoder: Any = None) -> Any:
            return copy.deepcopy(self.decoder) if decoder == encoder else own(self, decoder, encoder)

        with mock.patch.object(MusicgenConfig, "get_text_config", text_config):
            yield

    @staticmethod
    def restore_special_tokens(generation_config: GenerationConfig, model_config: Any) -> None:
        """Set the decoder's own ids: it starts and pads with the mask id and has no eos id."""
        mask_id = model_config.decoder.vocab_size
        generation_config.update(
            pad_token_id=mask_id, bos_token_id=mask_id, decoder_start_token_id=mask_id, eos_token_id=None
        )
