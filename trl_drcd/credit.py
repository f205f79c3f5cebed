"""
Credit of steps: from predicted and true rewards of completions to the advantage of each step. Pure functions.

Letters: `P` prompts, `G` generations per prompt, `B = P * G` completions (groups whole and contiguous), `M` prefixes
of a completion, `S` steps, `K` codebooks. Cosines, rewards, values and advantages have no unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trl_drcd.kernels import diversity_shares


def predicted_cosines(raw: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """
    Predicted cosine of sample j, of which a prefix is known, to each sample i of its group.

    Cosines of prefixes have a level of their own. The other members of the group tell how far it is from that of whole
    completions: `c_ji(m) = raw_ji(m) + mean_{k != i, j} (cos_ki - raw_ki(m))`. Where raw cosines are all alike this is
    the mean cosine of i to the samples that are not j. At `G = 2` there is no k; i itself stands for it, and the level
    is corrected by the other prompts ([`subtract_other_prompts`]).

    Args:
        raw (`torch.Tensor`): Cosine of prefix m of j to i, shape `(P, G, M, G)` with indices p, j, m, i.
        cosines (`torch.Tensor`): Of the completions, shape `(P, G, G)`.

    Returns:
        `torch.Tensor`: Shape `(P, G, M, G)`; entries with `i = j` have no meaning.
    """
    group = cosines.shape[-1]
    error = cosines[:, :, None, :] - raw  # of k about i
    itself = torch.eye(group, dtype=torch.bool, device=raw.device)[:, None, :]
    if group == 2:
        return raw + error.where(itself, 0.0).sum(1, keepdim=True)
    error = error.masked_fill(itself, 0.0)
    return raw + (error.sum(1, keepdim=True) - error) / (group - 2)


def plain_reward(cosines: torch.Tensor, kernel: str) -> torch.Tensor:
    """The reward that is expected of j without any prediction, from the others of its group; shape `(P, G, 1)`."""
    nothing = torch.zeros_like(cosines[:, :, None])
    return diversity_shares(cosines, predicted_cosines(nothing, cosines), kernel)


def generalized_advantages(
    values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gae_lambda: float
) -> torch.Tensor:
    """
    `A(n) = sum_k gae_lambda^k delta(n + k)` with `delta(n) = V(n + 1) - V(n)`, and the reward in place of `V` at the
    end.

    Generalised advantage estimation (https://huggingface.co/papers/1506.02438) without discount.

    Args:
        values (`torch.Tensor`): Predicted reward before each step, shape `(B, S)`.
        rewards (`torch.Tensor`): Shape `(B,)`.
        mask (`torch.Tensor`): True where a step counts, a prefix of each row; shape `(B, S)`.
        gae_lambda (`float`): 1 is the reward minus the value; 0 is `delta` alone.

    Returns:
        `torch.Tensor`: Shape `(B, S)`, 0 where `mask` is False.
    """
    if gae_lambda == 1:
        return (rewards[:, None] - values).masked_fill(~mask, 0.0)
    following = torch.where(mask[:, 1:], values[:, 1:], rewards[:, None])
    delta = (torch.cat([following, rewards[:, None]], dim=1) - values).masked_fill(~mask, 0.0)
    step = torch.arange(values.shape[1], device=values.device)
    later = (step[:, None] - step).clamp(min=0)  # rows: the later step
    weights = torch.tensor(gae_lambda, dtype=delta.dtype, device=delta.device).pow(later).tril()
    return (delta @ weights).masked_fill(~mask, 0.0)


def subtract_other_prompts(advantages: torch.Tensor, mask: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Advantages less the mean advantage of the other prompts at the same step.

    A level that all values miss alike would be noise; what other prompts say of it does not depend on this one's
    samples, so nothing becomes biased.

    Args:
        advantages (`torch.Tensor`): Shape `(B, S)`, 0 where `mask` is False.
        mask (`torch.Tensor`): True where a step counts, shape `(B, S)`.
        num_generations (`int`): Group size `G`.

    Returns:
        `torch.Tensor`: Shape `(B, S)`; unchanged where no other prompt has a sample of that length.
    """
    sums = torch.stack([advantages, mask.to(advantages)]).unflatten(1, (-1, num_generations)).sum(2)  # (2, P, S)
    total, count = (sums.sum(1, keepdim=True) - sums).unbind()
    level = torch.where(count > 0, total / count.clamp(min=1), 0.0)
    return (advantages - level.repeat_interleave(num_generations, 0)).masked_fill(~mask, 0.0)


def per_code(advantages: torch.Tensor, steps: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
    """
    The advantage of each code: that of the block of the step at which it is drawn.

    A step draws its `K` codes at once, each from the steps before it, so that `log p(step) = sum_k log p(code_k |
    steps before)`: one action, one advantage. With delayed codebooks the codes of one frame are drawn at K different
    steps. The value before the *frame* would be unbiased for each of them as well, but it knows less of the prefix
    than the value before the step; and the value after the frame's other codes would know, for the first codebooks,
    codes that are drawn later. So the step decides, delayed or not, and the layout of the frames does not matter.

    Args:
        advantages (`torch.Tensor`): Of blocks, shape `(B, M + 1)`.
        steps (`Sequence[int]`): First steps of the blocks after the first one, rising; `M` of them.
        mask (`torch.Tensor`): True where a code is scored, shape `(B, S, K)`; False in delays and padding.

    Returns:
        `torch.Tensor`: Shape `(B, S, K)`, 0 where `mask` is False.
    """
    step = torch.arange(mask.shape[1], device=mask.device)
    block = torch.searchsorted(torch.as_tensor(steps, device=mask.device), step, right=True)
    return advantages[:, block, None].expand(mask.shape).masked_fill(~mask, 0.0)
