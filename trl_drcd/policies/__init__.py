"""
Policies: everything that differs between model families, behind one protocol.

The losses and the trainer use `hidden (B, S, H)`, `K` heads, and `ids` and `mask` of shape `(B, S, K)`; a text LM has
`K = 1`. Elsewhere a completion is a flat list of `S` or `S * K` ids, in the family's own layout.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.guidance import EarlySteps
from trl_drcd.heads import Head
from trl_drcd.policies.allowed import complement, own_allowed_token_ids, resolve_token_ids
from trl_drcd.policies.causal_lm import CausalLMPolicy, without_peft
from trl_drcd.policies.dia import DiaPolicy
from trl_drcd.policies.musicgen import MusicgenPolicy
from trl_drcd.prompts import Prompt, Row
from trl_drcd.sampling import Rollout


class Policy(Protocol):
    """
    Interface of a model family for training and evaluation.

    Built from `(tokenizer, config, chat_template_kwargs, allowed_token_ids)`.

    Letters: `B` sequences, `P` prompt tokens, `S` steps, `K` codebooks, `V` vocabulary, `H` hidden size.
    """

    tokenizer: Any
    """Of the prompts; for text, of the completions too."""
    rolls_out_with_trl: bool
    """Whether TRL can sample the rollouts (vLLM, continuous batching) on request."""
    has_own_codec: bool
    """Whether the model itself decodes completions to audio."""
    num_codebooks: int
    """K: number of ids per step."""
    first_frame_steps: int
    """Steps that hold the first whole frame: 1 more than the longest delay of a codebook; 1 for text."""
    in_trl: Any
    """A [`~trl_drcd.compat.family_hooks.FamilyInTRL`]."""
    frozen: str | None
    """
    Regular expression for the names of frozen modules; they stay unsharded when the rest is sharded. With one, this
    package applies FSDP2 and not accelerate.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        """Freeze the modules that must not train, before the teacher is copied and the optimizer is created."""

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Write the files that a saved folder needs in addition to model and tokenizer."""

    def codec(self, model: PreTrainedModel) -> Any:
        """The model's own codec; `None` unless `has_own_codec`."""

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """Vocabulary size of prompts."""

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The module whose output (logits or last hidden states) TRL samples each step from."""

    def check_length(self, max_completion_length: int) -> None:
        """Raise `ValueError` if `max_completion_length` is too short for the family's layout."""

    def negative_prompt_ids(self, rows: Sequence[Row], negative_prompt: Prompt | None) -> list[list[int]]:
        """Token ids of each row's negative prompt: its own, else the given one, else the null prompt."""

    def hidden_states(
        self,
        model: PreTrainedModel,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Last hidden states that predict each step, `(B, S, H)`; `(B, S, K, H)` if each codebook has its own.

        They depend on no later step, and those of the first codebook not on the codes of their own step.
        """

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(S, K, V)` of the model's own forward on one unpadded sequence; the model may be wrapped."""

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """The `K` output heads."""

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 `(B, S, K)`, and a boolean mask of the scored ones, `(B, S, K)`."""

    def rollout(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        negative_prompt_ids: list[list[int]] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        max_new_tokens: int = 20,
        eos_token_ids: list[int] | None = None,
        early: EarlySteps | None = None,
    ) -> Rollout:
        """
        Sample without truncation or penalties, with log-probabilities; guided if `guidance_scale` is not 1, in the
        `early` steps with their own scale.
        """


def policy_class(
    model: Any, revision: str | None = None
) -> type[CausalLMPolicy] | type[MusicgenPolicy] | type[DiaPolicy]:
    """
    Choose the policy class of a model: that of its configuration's class, else from `config.model_type`.

    A family of one's own has the class attribute `drcd_policy` in its configuration's class; by name or folder it is
    found once that class is registered (`AutoConfig.register`).

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`): A model, or its name or folder.
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.

    Returns:
        `type`: `config.drcd_policy` where there is one, [`MusicgenPolicy`] for MusicGen, [`DiaPolicy`] for Dia,
            [`CausalLMPolicy`] for every other type.

    Raises:
        ValueError: If the model is a melody MusicGen, which is not supported.
    """
    if isinstance(model, str):
        # The raw dictionary also works for models whose configuration class is custom code
        fields, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        model_type = fields.get("model_type")
        known = CONFIG_MAPPING[str(model_type)] if model_type in CONFIG_MAPPING else None
    else:
        model_type, known = model.config.model_type, type(model.config)
    own: type[CausalLMPolicy] | None = getattr(known, "drcd_policy", None)
    if own is not None:
        return own
    if model_type == "musicgen_melody":
        raise ValueError(
            "`model` is a MusicGen melody checkpoint, whose melody prompt is not supported; use a text-only one, "
            "e.g. facebook/musicgen-small, -medium or -large"
        )
    if model_type == "dia":
        return DiaPolicy
    return MusicgenPolicy if model_type == "musicgen" else CausalLMPolicy


def policy_for(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
    allowed_token_ids: torch.Tensor | None = None,
) -> Policy:
    """
    The policy of a loaded model and its tokenizer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template.
        allowed_token_ids (`torch.Tensor`, *optional*): Tokens of completions, int64 `(V',)`; by default those that the
            model's generation config does not suppress.
    """
    family = policy_class(model)
    if allowed_token_ids is None and family is CausalLMPolicy:
        vocabulary = CausalLMPolicy(tokenizer).prompt_vocabulary(model)
        allowed_token_ids = own_allowed_token_ids(model, vocabulary)
    return family(tokenizer, model.config, chat_template_kwargs, allowed_token_ids)


def teacher_prompt_ids(policy: Policy, rows: Sequence[Row]) -> list[list[int]]:
    """
    Token ids of what the teacher reads with guidance: each row's `teacher_prompt`, else its `prompt`.

    Both are rendered as a negative prompt is: where `prompt` is a conversation, a text becomes a user turn.

    Args:
        policy (`Policy`): The policy of the model family.
        rows (`Sequence[dict]`): Dataset rows with `prompt` and perhaps `teacher_prompt`.

    Returns:
        `list[list[int]]`: One sequence per row; nothing is truncated.
    """
    given = [row["prompt"] if row.get("teacher_prompt") is None else row["teacher_prompt"] for row in rows]
    read = [{"prompt": row["prompt"], "negative_prompt": own} for row, own in zip(rows, given, strict=True)]
    return policy.negative_prompt_ids(read, None)


def allowed_token_ids(
    entries: Sequence[str] | None, model: Any, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[torch.Tensor | None, list[int] | None]:
    """
    The tokens that completions of a model may have, and those that its generation config must suppress for that.

    Args:
        entries (`Sequence[str]`, *optional*): See [`~trl_drcd.validation.token_ids.as_entries`]; by default what the
            model's generation config does not suppress.
        model (`PreTrainedModel` or `PeftModel`): The loaded model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        eos_token_ids (`Sequence[int]`): Ids that end a completion.

    Returns:
        `tuple`: Sorted ids, int64 `(V',)`, and all others as a list; both `None` where every token is allowed.

    Raises:
        ValueError: If the entries do not fit model and tokenizer; see
            [`~trl_drcd.policies.allowed.resolve_token_ids`].
    """
    if policy_class(model) is not CausalLMPolicy:
        return None, None
    vocabulary = CausalLMPolicy(tokenizer).prompt_vocabulary(model)
    if entries is None:
        allowed = own_allowed_token_ids(model, vocabulary)
    else:
        allowed = resolve_token_ids(entries, tokenizer, vocabulary, eos_token_ids)
    return allowed, None if allowed is None else complement(allowed, vocabulary).tolist()


__all__ = [
    "CausalLMPolicy",
    "DiaPolicy",
    "MusicgenPolicy",
    "Policy",
    "allowed_token_ids",
    "policy_class",
    "policy_for",
    "teacher_prompt_ids",
    "without_peft",
]
