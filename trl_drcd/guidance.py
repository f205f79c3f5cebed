"""
Classifier-free guidance, Eq. (1) of https://huggingface.co/papers/2410.06084, on logits, on hidden states, and in
sampling.

Letters: `B` sequences, `S` steps, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


def ancestral_generation_config(config: GenerationConfig, temperature: float, **overrides: Any) -> GenerationConfig:
    """
    A generation config that samples from the model's own distribution `softmax(logits / temperature)`, guidance off.

    Each neutral value is given explicitly, because `generate` fills what is `None` with its defaults (`top_k=50`). Of
    the given config only the special token ids and the lengths are kept.

    Args:
        config (`GenerationConfig`): The model's own.
        temperature (`float`): T, above 0.
        **overrides: Further fields, e.g. `max_new_tokens`.

    Returns:
        `GenerationConfig`: A new one.
    """
    kept = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens")
    fields: dict[str, Any] = {name: getattr(config, name) for name in kept if getattr(config, name) is not None}
    if fields.get("pad_token_id") is None and fields.get("eos_token_id") is not None:
        eos = fields["eos_token_id"]
        fields["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    fields |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_beams": 1}
    fields |= {"guidance_scale": 1.0, "repetition_penalty": 1.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
    return GenerationConfig(**(fields | overrides))


def guide_logits(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """
    Classifier-free guidance on logits: `uncond + guidance_scale * (cond - uncond)`.

    Eq. (1) of https://huggingface.co/papers/2410.06084. A scale of 1 returns `cond`, 0 returns `uncond`.

    Args:
        cond (`torch.Tensor`): Conditional logits, shape `(..., V)`.
        uncond (`torch.Tensor`): Unconditional (or negative-prompt) logits, same shape.
        guidance_scale (`float`): gamma; no unit.

    Returns:
        `torch.Tensor`: Same shape, in float32 (float64 where an input is float64).

    Raises:
        ValueError: If the shapes differ.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"`cond` and `uncond` must have one shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}")
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), torch.float32)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    if guidance_scale == 1:
        return cond  # exactly: `uncond + (cond - uncond)` is off by rounding, and NaN where both are -inf
    if guidance_scale == 0:
        return uncond  # also where `cond` is -inf
    guided = uncond + guidance_scale * (cond - uncond)
    # A token that either stream forbids (-inf) stays forbidden instead of becoming NaN
    forbidden = cond.isneginf() | uncond.isneginf()
    return guided.masked_fill(forbidden, -torch.inf)


def guide_hidden_states(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """
    Classifier-free guidance before the output head: `uncond + guidance_scale * (cond - uncond)`.

    Logits are affine in the last hidden state and the weights `guidance_scale` and `1 - guidance_scale` add up to 1,
    so that projecting the guided hidden state once gives the guided logits, bias included. It does not hold when the
    logits pass through something non-linear afterwards (`final_logit_softcapping`): guide the logits themselves there.

    Args:
        cond (`torch.Tensor`): Conditional last hidden states, shape `(..., H)`.
        uncond (`torch.Tensor`): Unconditional last hidden states, same shape.
        guidance_scale (`float`): gamma; no unit.

    Returns:
        `torch.Tensor`: Same shape, in float32 (float64 where an input is float64).

    Raises:
        ValueError: If the shapes differ.
    """
    return guide_logits(cond, uncond, guidance_scale)


class TeacherCFGLogitsProcessor(LogitsProcessor):
    """
    Samples from the guided distribution inside `generate`, with both streams in one doubled batch.

    The batch given to `generate` holds the conditional rows first and their unconditional rows after them, in the same
    order. Each step this processor guides the two halves (Eq. 1), draws one token per pair from
    `softmax(guided / temperature)`, and returns scores that leave only that token possible, in both halves: so the
    halves stay equal, and each keeps its own cache and its own padding. Call `generate(do_sample=False, ...)`, so that
    nothing touches the scores before or afterwards, or use [`generate_guided`], which does all of it.

    Args:
        guidance_scale (`float`): gamma; no unit.
        temperature (`float`, *optional*, defaults to 1.0): Temperature of the softmax; above 0.

    Raises:
        ValueError: If `temperature` is not above 0.
    """

    def __init__(self, guidance_scale: float, temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        self.guidance_scale = guidance_scale
        self.temperature = temperature

    def guided_log_probs(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(B, V)` of the guided distribution from the doubled logits `(2B, V)`, in nats."""
        if scores.shape[0] % 2:
            raise ValueError(f"`scores` must have conditional and unconditional rows, got {scores.shape[0]} rows")
        cond, uncond = scores.chunk(2)
        return (guide_logits(cond, uncond, self.guidance_scale) / self.temperature).log_softmax(-1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Inverse of the distribution function, in float64 so that no rare token is lost: with a large vocabulary
        # `torch.multinomial`, which draws a random number for every token, takes many times as long
        cumulated = self.guided_log_probs(scores).exp().cumsum(-1, dtype=torch.float64)
        draw = torch.rand(len(cumulated), 1, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, draw, right=True).clamp(max=scores.shape[1] - 1).repeat(2, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def left_pad(sequences: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Left-pad token sequences into one batch.

    Args:
        sequences (`list[list[int]]`): `B` sequences of token ids; an empty one becomes padding alone.
        pad_token_id (`int`): Token that fills the left.

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
    The rows of one batch: the prompts, and with guidance the unconditional or negative prompts after them.

    Raises:
        ValueError: If guidance is asked for without as many negative prompts as prompts.
    """
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
) -> torch.Tensor:
    """
    Sample completions from a causal LM, with classifier-free guidance where `guidance_scale` is not 1.

    Sampling is ancestral: no truncation and no penalty, whatever the model's generation config says; only the
    temperature. With guidance, one doubled batch per step.

    Args:
        model (`PreTrainedModel`): A causal LM; its generation config gives the pad and eos ids.
        prompt_ids (`list[list[int]]`): `B` prompts, token ids.
        negative_prompt_ids (`list[list[int]]`, *optional*): The `B` unconditional or negative prompts; needed with
            guidance.
        guidance_scale (`float`, *optional*, defaults to 1.0): gamma. 1 samples the model alone, at half the cost.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
        max_new_tokens (`int`, *optional*, defaults to 20): Largest number of completion tokens.

    Returns:
        `torch.Tensor`: Completion ids, int64, shape `(B, <= max_new_tokens)`, filled with the pad id after an eos.

    Raises:
        ValueError: If guidance is asked for without as many negative prompts as prompts.
    """
    guided, rows = guidance_scale != 1, stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale)
    if not guided:
        config = ancestral_generation_config(model.generation_config, temperature, max_new_tokens=max_new_tokens)
        return generate_rows(model, rows, config)
    output = generate_drawn(model, rows, TeacherCFGLogitsProcessor(guidance_scale, temperature), max_new_tokens)
    return output[: len(prompt_ids)]


def generate_drawn(
    model: Any, rows: list[list[int]], processor: LogitsProcessor, max_new_tokens: int, **overrides: Any
) -> torch.Tensor:
    """
    `generate` with a processor that draws the tokens itself and leaves only one possible in each row.

    Args:
        model (`PreTrainedModel`): A causal LM.
        rows (`list[list[int]]`): Token ids, not yet padded.
        processor (`LogitsProcessor`): Gets the model's own logits, unless its generation config forbids tokens.
        max_new_tokens (`int`): Largest number of completion tokens.
        **overrides: Further fields of the generation config, e.g. `eos_token_id`.

    Returns:
        `torch.Tensor`: Completion ids of every row, int64, shape `(len(rows), <= max_new_tokens)`.
    """
    overrides["max_new_tokens"] = max_new_tokens
    config = ancestral_generation_config(model.generation_config, 1.0, **overrides)
    config.update(do_sample=False, top_k=50)  # the values that `generate` does not warn of
    return generate_rows(model, rows, config, processor)


def generate_rows(
    model: Any, rows: list[list[int]], config: GenerationConfig, *processors: LogitsProcessor
) -> torch.Tensor:
    """Completion ids `(len(rows), <= max_new_tokens)` of `generate` with `config` alone, whatever the model's own."""
    own_config = model.generation_config
    ids, mask = left_pad(rows, config.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        model.generation_config = config  # whose gaps `generate` would fill from the model's own
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        model.generation_config = own_config
    return output[:, ids.shape[1] :]
