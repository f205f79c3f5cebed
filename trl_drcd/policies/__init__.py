"""
Policies: all that differs between model families, behind one protocol.

The losses and the trainer see `hidden (B, S, H)`, `K` heads, and `ids`, `mask` of shape `(B, S, K)`; a text LM has `K
= 1`. Between them, a completion is a list of ids: `S` of them, or `S * K`, as the family lays them out.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from trl_drcd.heads import Head
from trl_drcd.policies.causal_lm import CausalLMPolicy
from trl_drcd.policies.musicgen import MusicgenPolicy
from trl_drcd.sampling import Rollout


class Policy(Protocol):
    """What trainer and evaluation ask of a model family. Made of `(tokenizer, config, chat_template_kwargs)`."""

    rolls_out_with_trl: bool
    """Whether TRL can sample the rollouts (vLLM, continuous batching), where it is asked for."""
    has_own_codec: bool
    """Whether completions are made audio by a part of the model."""
    num_codebooks: int
    """K: how many ids a step has."""
    in_trl: Any
    """A [`~trl_drcd.compat.trl_private.FamilyInTRL`]."""
    frozen: str | None
    """Pattern of the names of parts that never train; each process keeps them whole where the rest is sharded."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Freezes what must not train, before the teacher is copied and the optimiser is made."""

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Writes what a saved folder needs beside model and tokenizer."""

    def codec(self, model: PreTrainedModel) -> Any:
        """The model's own codec, where `has_own_codec`; else `None`."""

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """Number of tokens that a prompt may hold."""

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The module whose output, logits or last hidden states, each step that TRL samples comes from."""

    def check_length(self, max_completion_length: int) -> None:
        """Refuses completions that are too short for the family's layout."""

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

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(S, K, V)` of the model's own forward, perhaps wrapped, on one sequence without padding."""

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """The `K` output heads."""

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scored tokens, int64 `(B, S, K)`, and the boolean mask of those that count, `(B, S, K)`."""

    def rollout(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        negative_prompt_ids: list[list[int]] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        max_new_tokens: int = 20,
        eos_token_ids: list[int] | None = None,
    ) -> Rollout:
        """Samples, without truncation or penalties, guided where `guidance_scale` is not 1, with log-probabilities."""

    def sample(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        negative_prompt_ids: list[list[int]] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        max_new_tokens: int = 20,
    ) -> list[list[int]]:
        """The completions of [`Policy.rollout`], as lists of ids."""


def policy_class(model: Any, revision: str | None = None) -> type[CausalLMPolicy] | type[MusicgenPolicy]:
    """
    The policy of a model family, by `config.model_type`: the one place where a family is chosen.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`): A model, or its name or folder.
        revision (`str`, *optional*): Of a name on the hub.

    Raises:
        ValueError: If the checkpoint is of a family or kind that is known and not supported.
    """
    if isinstance(model, str):
        # The bare dictionary: it says the family also of a model whose configuration is code of its own
        fields, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        model_type = fields.get("model_type")
    else:
        model_type = model.config.model_type
    if model_type == "musicgen_melody":
        raise ValueError(
            "`model` is a MusicGen melody checkpoint, whose melody prompt is not supported; use a text-only one, "
            "e.g. facebook/musicgen-small, -medium or -large"
        )
    if model_type != "musicgen":
        return CausalLMPolicy
    MusicgenPolicy.check_config(
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        if isinstance(model, str)
        else model.config
    )
    return MusicgenPolicy


def policy_for(model: Any, tokenizer: Any) -> Policy:
    """The policy of a loaded model and its tokenizer."""
    return policy_class(model)(tokenizer, model.config)


__all__ = ["CausalLMPolicy", "MusicgenPolicy", "Policy", "policy_class", "policy_for"]
