"""Sampling with transformers' `generate`, for causal LMs that the decode loop does not support."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor

from trl_drcd.guidance import EarlySteps, generate_drawn, guide_logits
from trl_drcd.sampling.drawing import Drawn, draw
from trl_drcd.sampling.loop import Rollout, check_sampling


class DrawingProcessor(LogitsProcessor):
    """Draw the tokens of each step as [`~trl_drcd.sampling.loop.decode`] does, and record them in `steps`."""

    def __init__(
        self,
        guidance_scale: float,
        temperature: float,
        token_ids: torch.Tensor | None = None,
        early: EarlySteps | None = None,
    ):
        self.guidance_scale, self.temperature, self.token_ids = guidance_scale, temperature, token_ids
        self.early = early
        self.steps: list[Drawn] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        guided = self.guidance_scale != 1
        cond, uncond = scores.chunk(2) if guided else (scores, scores)
        scale = self.early.scale_at(len(self.steps), self.guidance_scale) if self.early else self.guidance_scale
        logits = guide_logits(cond, uncond, scale).clone()
        if self.token_ids is not None:
            logits = logits[:, self.token_ids]
        uniform = torch.rand(len(logits), dtype=torch.float64, device=scores.device)
        self.steps.append(draw(logits, uniform, self.temperature))
        token = self.steps[-1].tokens[:, None]
        token = token if self.token_ids is None else self.token_ids[token]
        return torch.full_like(scores, -torch.inf).scatter_(1, token.repeat(1 + guided, 1), 0.0)


@torch.no_grad()
def generate(
    model: Any,
    rows: list[list[int]],
    steps: int,
    guidance_scale: float,
    temperature: float,
    eos_token_ids: list[int],
    token_ids: torch.Tensor | None = None,
    early: EarlySteps | None = None,
) -> Rollout:
    """
    [`~trl_drcd.sampling.loop.decode`] with `generate`: equal prompts are not shared, and finished sequences stay in
    the batch.

    Args:
        model (`PreTrainedModel`): A causal LM, with or without adapters.
        rows (`list[list[int]]`): Token ids of the prompts, followed, with guidance, by the unconditional prompts.
        steps, guidance_scale, temperature, eos_token_ids, token_ids, early: As in
            [`~trl_drcd.sampling.loop.decode`].

    Returns:
        [`~trl_drcd.sampling.Rollout`]: `K` is 1.

    Raises:
        ValueError: If `temperature` is not above 0 or `steps` is below 1.
    """
    check_sampling(steps, temperature)
    processor = DrawingProcessor(guidance_scale, temperature, token_ids, early)
    ids = generate_drawn(model, rows, processor, steps, eos_token_id=eos_token_ids or None)
    ids = ids[: len(rows) // (1 + (guidance_scale != 1))]
    ended = torch.isin(ids, torch.tensor(eos_token_ids, dtype=torch.long, device=ids.device)).cumsum(1)
    drawn = torch.nn.functional.pad(ended[:, :-1], (1, 0)) == 0
    log_probs = torch.stack([step.log_probs for step in processor.steps], dim=1).where(drawn, 0.0)
    finite = torch.stack([step.finite for step in processor.steps], dim=1) | ~drawn
    return Rollout(ids[..., None], log_probs[..., None], drawn[..., None], finite.all(1))
