"""
Credit assignment: per-step advantages from predicted and true rewards of completions. Pure functions.

Letters: `P` prompts, `G` generations per prompt, `B = P * G` completions (whole, contiguous groups), `M` prefixes of a
completion, `S` steps, `K` codebooks. Cosines, rewards, values and advantages have no unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trl_drcd.kernels import diversity_shares


def predicted_cosines(raw: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """
    Predicted cosine of sample j to each sample i of its group, given a prefix of j.

    The cosines of prefixes are biased with respect to those of whole completions. The bias is estimated from the other
    members of the group: `c_ji(m) = raw_ji(m) + mean_{k != i, j} (cos_ki - raw_ki(m))`. If all raw cosines are equal,
    this is the mean cosine of i to the samples other than j. At `G = 2` there is no such k, and i itself is used; the
    resulting bias is removed by [`subtract_other_prompts`].

    Args:
        raw (`torch.Tensor`): Cosine of prefix m of j to i, shape `(P, G, M, G)` with indices p, j, m, i.
        cosines (`torch.Tensor`): Cosines of the completions, shape `(P, G, G)`.

    Returns:
        `torch.Tensor`: Shape `(P, G, M, G)`; entries with `i = j` are meaningless.
    """
    group = cosines.shape[-1]
    error = cosines[:, :, None, :] - raw  # error of k's prediction about i
    itself = torch.eye(group, dtype=torch.bool, device=raw.device)[:, None, :]
    if group == 2:
        return raw + error.where(itself, 0.0).sum(1, keepdim=True)
    error = error.masked_fill(itself, 0.0)
    return raw + (error.sum(1, keepdim=True) - error) / (group - 2)


def plain_reward(cosines: torch.Tensor, kernel: str) -> torch.Tensor:
    """Expected reward of j without a prefix, estimated from the others of its group; shape `(P, G, 1)`."""
    nothing = torch.zeros_like(cosines[:, :, None])
    return diversity_shares(cosines, predicted_cosines(nothing, cosines), kernel)


def generalized_advantages(
    values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gae_lambda: float
) -> torch.Tensor:
    """
    `A(n) = sum_k gae_lambda^k delta(n + k)` with `delta(n) = V(n + 1) - V(n)`, where the last `V` is the reward.

    Generalised advantage estimation (https://huggingface.co/papers/1506.02438) without discounting.

    Args:
        values (`torch.Tensor`): Predicted reward before each step, shape `(B, S)`.
        rewards (`torch.Tensor`): Reward of each completion, shape `(B,)`.
        mask (`torch.Tensor`): True for the steps of a completion, which come first in each row; shape `(B, S)`.
        gae_lambda (`float`): In `[0, 1]`. 1 gives reward minus value; 0 gives `delta`.

    Returns:
        `torch.Tensor`: Shape `(B, S)`, 0 where `mask` is False.
    """
    if gae_lambda == 1:
        return (rewards[:, None] - values).masked_fill(~mask, 0.0)
    following = torch.where(mask[:, 1:], values[:, 1:], rewards[:, None])
    delta = (torch.cat([following, rewards[:, None]], dim=1) - values).masked_fill(~mask, 0.0)
    step = torch.arange(values.shape[1], device=values.device)
    later = (step[:, None] - step).clamp(min=0)  # row: later step, column: earlier step
    weights = torch.tensor(gae_lambda, dtype=delta.dtype, device=delta.device).pow(later).tril()
    return (delta @ weights).masked_fill(~mask, 0.0)


def subtract_other_prompts(advantages: torch.Tensor, mask: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Advantages minus the mean advantage of the other prompts at the same step.

    This removes an error that all values have in common, which would add noise. The mean over other prompts does not
    depend on this prompt's samples, so the gradient stays unbiased.

    Args:
        advantages (`torch.Tensor`): Shape `(B, S)`, 0 where `mask` is False.
        mask (`torch.Tensor`): True for the steps of a completion, shape `(B, S)`.
        num_generations (`int`): Group size `G`.

    Returns:
        `torch.Tensor`: Shape `(B, S)`; unchanged at steps that no sample of another prompt reaches.
    """
    sums = torch.stack([advantages, mask.to(advantages)]).unflatten(1, (-1, num_generations)).sum(2)  # (2, P, S)
    total, count = (sums.sum(1, keepdim=True) - sums).unbind()
    level = torch.where(count > 0, total / count.clamp(min=1), 0.0)
    return (advantages - level.repeat_interleave(num_generations, 0)).masked_fill(~mask, 0.0)


def per_code(advantages: torch.Tensor, steps: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
    """
    The advantage of each code: that of the block containing the step at which it is drawn.

    The `K` codes of a step, drawn together or one after another, are one action with one advantage: `log p(step)` is
    the sum of their log-probabilities, given the previous steps. With delayed codebooks, the codes of one frame are
    drawn at K different steps. Using the value before the *frame* would also be unbiased, but that value is based on a
    shorter prefix. Using the value after the other codes of the frame would be biased: for the first codebooks, it
    depends on codes drawn later. Credit is therefore assigned by step, for any layout of the frames.

    Args:
        advantages (`torch.Tensor`): Advantages of the blocks, shape `(B, M + 1)`.
        steps (`Sequence[int]`): First steps of the second and later blocks, increasing; `M` values.
        mask (`torch.Tensor`): True where a code is scored, shape `(B, S, K)`; False in delays and padding.

    Returns:
        `torch.Tensor`: Shape `(B, S, K)`, 0 where `mask` is False.
    """
    step = torch.arange(mask.shape[1], device=mask.device)
    block = torch.searchsorted(torch.as_tensor(steps, device=mask.device), step, right=True)
    return advantages[:, block, None].expand(mask.shape).masked_fill(~mask, 0.0)
