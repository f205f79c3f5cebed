"""Check that the decode loop draws from a model's own distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from trl_drcd.policies import Policy

STEPS = 16  # of each completion that is compared
# KL per token that the rounding of two computations of one distribution explains, nats. bfloat16 rounding gives about
# 0.001; dropout of 0.1, a wrong head or a shifted position gives 0.1 to 5
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.05


def largest_difference(tolerance: float) -> float:
    """Mean difference of log-probabilities, nats, of two distributions whose KL is the `tolerance`."""
    return math.sqrt(2 * tolerance)


@torch.no_grad()
def check_sampler(policy: Policy, model: Any, prompt_ids: Sequence[list[int]], max_new_tokens: int = STEPS) -> None:
    """
    Check that the sampler's log-probabilities are those of the model's own forward on each unpadded sequence.

    A family whose cache, positions, padding or head the decode loop does not support would be sampled from another
    distribution without a sign of it. The random state stays as it was.

    Args:
        policy ([`~trl_drcd.policies.Policy`]): The policy of the model's family.
        model (`PreTrainedModel`): In evaluation mode.
        prompt_ids (`list[list[int]]`): Prompts; the shortest and one of the next length are read.
        max_new_tokens (`int`, *optional*, defaults to 16): The most that will be sampled.

    Raises:
        ValueError: If the mean difference is larger than rounding explains.
    """
    shortest = min(prompt_ids, key=len)
    longer = min((prompt for prompt in prompt_ids if len(prompt) > len(shortest)), key=len, default=shortest)
    prompts, steps = [shortest, longer], min(max_new_tokens, max(STEPS, 2 * policy.num_codebooks))
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        rollout = policy.rollout(model, prompts, max_new_tokens=steps)
    differences = []
    for row, (prompt, completion) in enumerate(zip(prompts, rollout.completions(), strict=True)):
        ids = torch.tensor([completion], device=model.device)
        own = policy.own_logits(model, torch.tensor([prompt], device=model.device), ids).float().log_softmax(-1)
        tokens, scored = (part[0] for part in policy.ids_and_mask(ids, torch.ones_like(ids)))
        counted = scored & rollout.drawn[row, : len(tokens)]
        found = own[counted].gather(-1, tokens[counted][:, None])[:, 0]
        differences.append((found - rollout.log_probs[row, : len(tokens)][counted].float()).abs())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    limit = largest_difference(TOLERANCE.get(dtype, HALF_TOLERANCE))
    away = float(torch.cat(differences).mean())
    if away > limit:  # weights that give NaN are told of where rows are scored
        raise ValueError(
            f"{type(model).__name__} cannot be sampled here: the sampler draws tokens at log-probabilities {away:.2g} "
            f"nats away from those of the model's own forward pass (rounding explains at most {limit:.2g}), so its "
            "cache, its positions or its head are not supported"
        )
