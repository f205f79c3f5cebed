"""Causal language models: text, or audio tokens in one stream (`K = 1`)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import get_logger

from trl_drcd.compat.dropout import turn_off_dropout
from trl_drcd.compat.family_hooks import CausalLMInTRL
from trl_drcd.guidance import EarlySteps, stacked_prompts
from trl_drcd.heads import Head
from trl_drcd.policies.allowed import AllowedTokens
from trl_drcd.policies.shared_prompts import distinct_prompts, shared_hidden_states, shared_refusal
from trl_drcd.prompts import Prompt, Row
from trl_drcd.sampling import CausalStream, Rollout, decode, generate, refusal, sampling_mode

logger = get_logger(__name__)


class CausalLMPolicy:
    """
    The policy of a causal LM.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizes negative prompts; its eos ends completions.
        config (`PretrainedConfig`, *optional*): Not used.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template, as the trainer does for prompts.
        allowed_token_ids (`torch.Tensor`, *optional*): Tokens of completions, sorted, int64 `(V',)`; heads have these
            rows, and ids are places among them. All by default.
    """

    rolls_out_with_trl = True
    has_own_codec = False
    num_codebooks = 1
    first_frame_steps = 1
    in_trl = CausalLMInTRL
    frozen: str | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        allowed_token_ids: torch.Tensor | None = None,
    ):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.allowed = None if allowed_token_ids is None else AllowedTokens(allowed_token_ids)

    def prepare(self, model: PreTrainedModel) -> None:
        """Turn off all dropout. No parameter is frozen here."""
        turn_off_dropout(model)

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Write nothing: model and tokenizer are enough."""

    def codec(self, model: PreTrainedModel) -> Any:
        """`None`: the codec of an audio-token model is a separate object."""
        return None

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """The head's vocabulary size: prompt and completion share one vocabulary."""
        weight: Any = self.heads(model)[0].weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # DeepSpeed ZeRO-3 leaves the weight itself empty

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The head."""
        head: torch.nn.Module = model.get_output_embeddings()
        return head

    def check_length(self, max_completion_length: int) -> None:
        """Accept any length."""

    def negative_prompt_ids(self, rows: Sequence[Row], negative_prompt: Prompt | None) -> list[list[int]]:
        """
        Token ids of each row's negative prompt.

        A row's own `negative_prompt` takes precedence over the argument. `None` is the null prompt: the tokenized
        empty text (for MusicLM-like models a begin token and the audio marker) or, for conversations, an empty user
        turn. If the row's prompt is a conversation, a text becomes a user turn. Nothing is truncated.

        Args:
            rows (`list[dict]`): Dataset rows with `prompt` and optionally `negative_prompt`.
            negative_prompt (`str`, `list[dict]` or `None`): Used for rows without their own.

        Returns:
            `list[list[int]]`: One non-empty sequence per row.

        Raises:
            ValueError: If a negative prompt has no tokens, or is a conversation while the prompt is a text.
        """
        return [self._negative_ids(row, negative_prompt) for row in rows]

    def _negative_ids(self, row: Row, default: Prompt | None) -> list[int]:
        negative = row.get("negative_prompt")
        negative = default if negative is None else negative
        text = "" if negative is None else negative
        if isinstance(row["prompt"], str):
            if not isinstance(text, str):
                raise ValueError(f"`negative_prompt` must be a text where `prompt` is one, got {type(text).__name__}")
            encoding: Any = self.tokenizer(text)
        else:
            turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
            encoding = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )
        ids = list(encoding["input_ids"])
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise ValueError(
                f"no unconditional input for guidance: the tokenizer renders `negative_prompt={negative!r}` as no "
                "token and has no `bos_token`; give a `negative_prompt`, or set `guidance_scale=1`"
            )
        return ids

    def hidden_states(
        self,
        model: PreTrainedModel,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Last hidden states at the positions that predict the completion. Equal prompts go through the model once
        ([`~trl_drcd.policies.shared_prompts`]), unless the family or the launch cannot.

        Args:
            model (`PreTrainedModel`): Unwrapped causal LM, with or without adapters.
            prompt_ids (`torch.Tensor`): Left-padded, int64, shape `(B, P)`.
            prompt_mask (`torch.Tensor`): 1 for tokens, 0 for padding, shape `(B, P)`.
            completion_ids (`torch.Tensor`): Right-padded, int64, shape `(B, S)`.
            completion_mask (`torch.Tensor`): 1 for tokens, 0 for padding, shape `(B, S)`.

        Returns:
            `torch.Tensor`: Shape `(B, S, H)`, after the final norm.
        """
        own = without_peft(model)
        backbone, before_head = _backbone(own), _before_head(own)
        first, index = distinct_prompts(prompt_ids, prompt_mask)
        if 2 * len(first) <= len(index) and before_head is None and shared_refusal(own) is None:
            rows = prompt_ids, prompt_mask, completion_ids, completion_mask
            return shared_hidden_states(backbone, *rows, first, index)
        # No scored token follows the last completion token
        input_ids = torch.cat([prompt_ids, completion_ids[:, :-1]], dim=1)
        mask = torch.cat([prompt_mask, completion_mask[:, :-1]], dim=1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            # Same positions as in `generate`: left padding must not shift learned positions
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden: torch.Tensor = backbone(**inputs).last_hidden_state
        hidden = hidden[:, -completion_ids.shape[1] :]
        return hidden if before_head is None else before_head(hidden)

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """
        Logits of the model's own forward on one unpadded sequence.

        Args:
            model (`PreTrainedModel`): The model, wrapped or not.
            prompt_ids (`torch.Tensor`): int64, shape `(1, P)`.
            completion_ids (`torch.Tensor`): int64, shape `(1, S)`.

        Returns:
            `torch.Tensor`: Logits of the allowed tokens that predict the completion, shape `(S, 1, V)`.
        """
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits = logits[0, prompt_ids.shape[1] - 1 : -1, None]
        return logits if self.allowed is None else logits[..., self.allowed.on(logits.device)]

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """The LM head, with the scaling and soft cap that the architecture applies to its logits."""
        head = without_peft(model).get_output_embeddings()
        config = model.config.get_text_config()
        scale = next(
            (
                s
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if (s := getattr(config, name, None))
            ),
            1.0,
        )
        if divisor := getattr(config, "logits_scaling", None):
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        if divisor := getattr(config, "logits_mup_width_multiplier", None):
            scale = 1 / divisor
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        token_ids = None if self.allowed is None else self.allowed.on(head.weight.device)
        return [Head(_full(head.weight), _full(head.bias), scale, softcap, token_ids=token_ids)]

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Completion ids, or their places among the allowed ones, `(B, S, 1)`, and boolean mask `(B, S, 1)`.

        Raises:
            ValueError: If a completion has a token that is not allowed.
        """
        ids, mask = completion_ids[..., None], completion_mask[..., None].bool()
        return ids if self.allowed is None else self.allowed.places(ids, mask), mask

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
        Sample completions, with classifier-free guidance (one doubled batch) if `guidance_scale` is not 1.

        Ancestral sampling: the temperature applies, but no truncation and no penalty, regardless of the model's
        generation config. Models that the decode loop does not support are sampled with `generate`.

        Args:
            model (`PreTrainedModel`): Unwrapped causal LM, with or without adapters.
            prompt_ids (`list[list[int]]`): `B` prompts; equal prompts are encoded once.
            negative_prompt_ids (`list[list[int]]`, *optional*): `B` negative prompts; required with guidance.
            guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1); 1 disables guidance.
            temperature (`float`, *optional*, defaults to 1.0): Above 0.
            max_new_tokens (`int`, *optional*, defaults to 20): Maximum number of completion tokens.
            eos_token_ids (`list[int]`, *optional*): Tokens that end a completion; by default, as in training, those of
                the model's generation config and the tokenizer's.
            early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

        Returns:
            [`~trl_drcd.sampling.Rollout`]: `K` is 1.

        Raises:
            ValueError: If guidance lacks negative prompts, or a prompt is empty.
        """
        own: Any = without_peft(model)
        config = own.generation_config
        eos = eos_token_ids
        if eos is None:
            eos = sorted({*as_list(config.eos_token_id), self.tokenizer.eos_token_id} - {None})
        rows = stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale)
        with sampling_mode(model, own):
            if (reason := loop_refusal(own)) is not None:
                logger.warning_once(f"Sampling goes through `generate`, which is slower: {reason}.")
                token_ids = self.heads(model)[0].token_ids
                return generate(model, rows, max_new_tokens, guidance_scale, temperature, eos, token_ids, early)
            stream, fill = CausalStream(own.base_model, rows, max_new_tokens), (as_list(config.pad_token_id) or [0])[0]
            return decode(
                stream, self.heads(model), max_new_tokens, guidance_scale, temperature, eos, fill, early=early
            )


def as_list(token_ids: int | list[int] | None) -> list[int]:
    """Token ids of a generation config entry, which may be one id, a list or `None`, as a list."""
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _backbone(model: Any) -> Any:
    """The module that returns last hidden states. For some classes (Llama 4 text) `base_model` is the causal LM."""
    return model.base_model if model.base_model is not model else model.model


def _before_head(model: Any) -> Any:
    """Layers between the last hidden states and the output embeddings; `None` if there are none."""
    return model.lm_head if model.config.model_type == "modernbert-decoder" else None


def loop_refusal(model: Any) -> str | None:
    """Why the decode loop cannot sample a causal LM without PEFT's wrapper; `None` if it can."""
    if (reason := refusal(model)) is not None:
        return reason
    if model.base_model is model:
        return f"`base_model` of {type(model).__name__} is itself"
    return None if _before_head(model) is None else f"{type(model).__name__} has layers before its output embeddings"


def without_peft(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with its adapters; other models are returned unchanged."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _full(parameter: Any) -> Any:
    """An FSDP2-sharded parameter gathered and detached; other parameters are returned unchanged."""
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter
