"""
Policies: all that differs between model families, behind one protocol.

The losses and the trainer see `hidden (B, S, H)`, `K` heads, and `ids`, `mask` of shape `(B, S, K)`; a text LM has `K
= 1`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..losses import Head
from .causal_lm import CausalLMPolicy


class Policy(Protocol):
    """What the trainer asks of a model family."""

    def negative_prompt_ids(self, rows: list[dict[str, Any]], negative_prompt: Any) -> list[list[int]]:
        """Token ids of each row's `x^-`: its own `negative_prompt`, else the given one, else the null prompt."""

    def hidden_states(
        self,
        model: PreTrainedModel,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Last hidden states `(B, S, H)` that predict each completion step."""

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """The `K` output heads."""

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scored tokens, int64 `(B, S, K)`, and the boolean mask of those that count, `(B, S, K)`."""


__all__ = ["CausalLMPolicy", "Policy"]
