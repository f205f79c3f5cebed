"""
Classifier-free guidance, Eq. (1) of https://huggingface.co/papers/2410.06084: on logits, on hidden states, and in
sampling.

Letters: `B` sequences, `S` steps, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


def ancestral_generation_config(config: GenerationConfig, temperature: float, **overrides: object) -> GenerationConfig:
    """
    A generation config for sampling from the model's own distribution `softmax(logits / temperature)`, without
    guidance.

    All neutral values are set explicitly, because `generate` replaces `None` by its defaults (`top_k=50`). Only the
    special token ids and the lengths are copied from the given config.

    Args:
        config (`GenerationConfig`): The model's own config.
        temperature (`float`): T, above 0.
        **overrides: Further fields, e.g. `max_new_tokens`.

    Returns:
        `GenerationConfig`: A new config.
    """
    kept = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens")
    fields: dict[str, Any] = {name: getattr(config, name) for name in kept if getattr(config, name) is not None}
    if fields.get("pad_token_id") is None and fields.get("eos_token_id") is not None:
        eos = fields["eos_token_id"]
        fields["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    fields |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_beams": 1}
    fields |= {"guidance_scale": 1.0, "repetition_penalty": 1.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
    return GenerationConfig(**(fields | overrides))


def guide_logits(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float | torch.Tensor) -> torch.Tensor:
    """
    Classifier-free guidance on logits: `uncond + guidance_scale * (cond - uncond)`.

    Eq. (1) of https://huggingface.co/papers/2410.06084. A scale of 1 returns `cond`, 0 returns `uncond`.

    Args:
        cond (`torch.Tensor`): Conditional logits, shape `(..., V)`.
        uncond (`torch.Tensor`): Unconditional (or negative-prompt) logits, same shape.
        guidance_scale (`float` or `torch.Tensor`): gamma; no unit. A tensor is broadcast to the logits.

    Returns:
        `torch.Tensor`: Same shape, in float32 (float64 where an input is float64).

    Raises:
        ValueError: If the shapes differ.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"`cond` and `uncond` must have one shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}")
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), torch.float32)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    if isinstance(guidance_scale, torch.Tensor):
        guidance_scale = guidance_scale.to(dtype)
        guided = _guided(cond, uncond, guidance_scale)
        return torch.where(guidance_scale == 1, cond, torch.where(guidance_scale == 0, uncond, guided))
    if guidance_scale == 1:
        return cond  # exact: `uncond + (cond - uncond)` has rounding errors, and is NaN where both are -inf
    if guidance_scale == 0:
        return uncond  # also where `cond` is -inf
    return _guided(cond, uncond, guidance_scale)


def _guided(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float | torch.Tensor) -> torch.Tensor:
    guided = uncond + guidance_scale * (cond - uncond)
    # A token that either stream forbids (-inf) stays forbidden instead of becoming NaN
    forbidden = cond.isneginf() | uncond.isneginf()
    return guided.masked_fill(forbidden, -torch.inf)


def guide_hidden_states(
    cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """
    Classifier-free guidance before the output head: `uncond + guidance_scale * (cond - uncond)`.

    Logits are affine in the last hidden state, and the weights `guidance_scale` and `1 - guidance_scale` sum to 1, so
    projecting the guided hidden state once gives the guided logits, bias included. This does not hold if a non-linear
    function is applied to the logits (`final_logit_softcapping`): guide the logits themselves there.

    Args:
        cond (`torch.Tensor`): Conditional last hidden states, shape `(..., H)`.
        uncond (`torch.Tensor`): Unconditional last hidden states, same shape.
        guidance_scale (`float` or `torch.Tensor`): gamma; no unit. A tensor is broadcast to the states.

    Returns:
        `torch.Tensor`: Same shape, in float32 (float64 where an input is float64).

    Raises:
        ValueError: If the shapes differ.
    """
    return guide_logits(cond, uncond, guidance_scale)


@dataclass(frozen=True)
class EarlySteps:
    """
    The first steps of completions, which have a guidance scale of their own.

    Early tokens decide in what the completions of a prompt differ.

    Args:
        count (`int`): Number of these steps.
        guidance_scale (`float`, *optional*, defaults to 1.0): Their gamma. 1 is the conditional model; below 1 the
            steps follow the prompt less, and 0 ignores it.
    """

    count: int
    guidance_scale: float = 1.0

    def scale_at(self, step: int, guidance_scale: float) -> float:
        """gamma of a step, counted from 0; `guidance_scale` is that of later steps."""
        return self.guidance_scale if step < self.count else guidance_scale


def step_scales(
    guidance_scale: float, early: EarlySteps | None, steps: int, like: torch.Tensor
) -> float | torch.Tensor:
    """
    gamma of each step.

    Args:
        guidance_scale (`float`): gamma after the early steps.
        early ([`EarlySteps`], *optional*): The early steps.
        steps (`int`): Steps `S` of the completions.
        like (`torch.Tensor`): Gives the device.

    Returns:
        `float` or `torch.Tensor`: `guidance_scale` if there are no early steps, else shape `(S,)`, float64.
    """
    if early is None:
        return guidance_scale
    scales = [early.scale_at(step, guidance_scale) for step in range(steps)]
    return torch.tensor(scales, dtype=torch.float64, device=like.device)


def scales_of_tokens(scales: float | torch.Tensor, scored: torch.Tensor) -> float | torch.Tensor:
    """[`step_scales`] for the scored tokens of a mask `(B, S)`: the number, or a tensor `(N, 1)`."""
    if not isinstance(scales, torch.Tensor):
        return scales
    return scales.expand(scored.shape)[scored][:, None]


class TeacherCFGLogitsProcessor(LogitsProcessor):
    """
    Samples from the guided distribution inside `generate`, with both streams in one doubled batch.

    The batch passed to `generate` has the conditional rows first, then the unconditional rows in the same order. At
    each step this processor applies guidance to the two halves (Eq. 1), draws one token per pair from
    `softmax(guided / temperature)`, and returns scores that allow only that token, in both halves. Both halves so get
    the same tokens, while each has its own cache and padding. Call `generate(do_sample=False, ...)`, so that no other
    processor changes the scores, or use [`generate_guided`].

    Args:
        guidance_scale (`float`): gamma; no unit.
        temperature (`float`, *optional*, defaults to 1.0): Temperature of the softmax; above 0.
        early ([`EarlySteps`], *optional*): The first steps, with a scale of their own. Steps are counted from the
            first call, so give every call of `generate` a processor of its own.

    Raises:
        ValueError: If `temperature` is not above 0.
    """

    def __init__(self, guidance_scale: float, temperature: float = 1.0, early: EarlySteps | None = None):
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        self.guidance_scale = guidance_scale
        self.temperature = temperature
        self.early, self.step = early, 0

    def guided_log_probs(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(B, V)` of this step's distribution from the doubled logits `(2B, V)`, in nats."""
        if scores.shape[0] % 2:
            raise ValueError(f"`scores` must have conditional and unconditional rows, got {scores.shape[0]} rows")
        cond, uncond = scores.chunk(2)
        scale = self.early.scale_at(self.step, self.guidance_scale) if self.early else self.guidance_scale
        return (guide_logits(cond, uncond, scale) / self.temperature).log_softmax(-1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Inverse transform sampling, in float64 so that rare tokens are not lost. For a large vocabulary
        # `torch.multinomial`, which draws a random number per token, takes many times as long
        cumulated = self.guided_log_probs(scores).exp().cumsum(-1, dtype=torch.float64)
        self.step += 1
        draw = torch.rand(len(cumulated), 1, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, draw, right=True).clamp(max=scores.shape[1] - 1).repeat(2, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def left_pad(sequences: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Left-pad token sequences into one batch.

    Args:
        sequences (`list[list[int]]`): `B` sequences of token ids; an empty one becomes a row of padding.
        pad_token_id (`int`): Padding token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Ids and attention mask, each int64 of shape `(B, longest)`.
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (longest - len(s)) + list(s) for s in sequences], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], dtype=torch.long)
    return ids, mask


def stacked_prompts(
    prompt_ids: list[list[int]], negative_prompt_ids: list[list[int]] | None, guidance_scale: float
) -> list[list[int]]:
    """
    The rows of one batch: the prompts, followed, with guidance, by the unconditional or negative prompts.

    Raises:
        TypeError: If the prompts are tensors.
        ValueError: If `guidance_scale` is not 1 and there is not one negative prompt per prompt.
    """
    for name, ids in {"prompt_ids": prompt_ids, "negative_prompt_ids": negative_prompt_ids}.items():
        if isinstance(ids, torch.Tensor):
            raise TypeError(f"`{name}` must be lists of token ids, unpadded, got a tensor; leave out `return_tensors`")
    if guidance_scale == 1:
        return list(prompt_ids)
    if len(negative_prompt_ids or []) != len(prompt_ids):
        raise ValueError(
            f"`guidance_scale={guidance_scale}` needs `negative_prompt_ids` with one entry per prompt "
            f"({len(prompt_ids)}), got {None if negative_prompt_ids is None else len(negative_prompt_ids)}"
        )
    return [*prompt_ids, *(negative_prompt_ids or [])]


@torch.no_grad()
def generate_guided(
    model: Any,
    prompt_ids: list[list[int]],
    negative_prompt_ids: list[list[int]] | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    max_new_tokens: int = 20,
    early: EarlySteps | None = None,
) -> torch.Tensor:
    """
    Sample completions from a causal LM, with classifier-free guidance if `guidance_scale` is not 1.

    Ancestral sampling: the temperature applies, but no truncation and no penalty, regardless of the model's generation
    config. With guidance, each step runs one doubled batch.

    Args:
        model (`PreTrainedModel`): A causal LM; its generation config gives the pad and eos ids.
        prompt_ids (`list[list[int]]`): `B` prompts, token ids.
        negative_prompt_ids (`list[list[int]]`, *optional*): `B` unconditional or negative prompts; required with
            guidance.
        guidance_scale (`float`, *optional*, defaults to 1.0): gamma. 1 disables guidance, at half the cost.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
        max_new_tokens (`int`, *optional*, defaults to 20): Maximum number of completion tokens.
        early ([`EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

    Returns:
        `torch.Tensor`: Completion ids, int64, shape `(B, <= max_new_tokens)`, filled with the pad id after an eos.

    Raises:
        ValueError: If `guidance_scale` is not 1 and there is not one negative prompt per prompt.
    """
    guided, rows = guidance_scale != 1, stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale)
    if not guided:
        config = ancestral_generation_config(model.generation_config, temperature, max_new_tokens=max_new_tokens)
        return generate_rows(model, rows, config)
    processor = TeacherCFGLogitsProcessor(guidance_scale, temperature, early)
    output = generate_drawn(model, rows, processor, max_new_tokens)
    return output[: len(prompt_ids)]


def generate_drawn(
    model: Any, rows: list[list[int]], processor: LogitsProcessor, max_new_tokens: int, **overrides: object
) -> torch.Tensor:
    """
    `generate` with a processor that draws the tokens itself and allows only the drawn token in each row.

    Args:
        model (`PreTrainedModel`): A causal LM.
        rows (`list[list[int]]`): Unpadded token ids.
        processor (`LogitsProcessor`): Gets the model's unprocessed logits.
        max_new_tokens (`int`): Maximum number of completion tokens.
        **overrides: Further fields of the generation config, e.g. `eos_token_id`.

    Returns:
        `torch.Tensor`: Completion ids of every row, int64, shape `(len(rows), <= max_new_tokens)`.
    """
    overrides["max_new_tokens"] = max_new_tokens
    config = ancestral_generation_config(model.generation_config, 1.0, **overrides)
    config.update(do_sample=False, top_k=50)  # values for which `generate` gives no warning
    return generate_rows(model, rows, config, processor)


def generate_rows(
    model: Any, rows: list[list[int]], config: GenerationConfig, *processors: LogitsProcessor
) -> torch.Tensor:
    """Completion ids `(len(rows), <= max_new_tokens)` of `generate` with `config` instead of the model's config."""
    own_config = model.generation_config
    ids, mask = left_pad(rows, config.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        model.generation_config = config  # `generate` would fill missing fields from the model's own config
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        model.generation_config = own_config
    return output[:, ids.shape[1] :]
