"""
Per-token terms of the joint objective, and the objective itself. Pure functions of tensors.

Letters: `B` sequences, `S` steps, `K` codebooks (1 for a text LM), `N` scored tokens, `V` vocabulary, `H` hidden size.
KL, log-probabilities and entropy are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .guidance import guide_hidden_states, guide_logits

# Logits of this many tokens x vocabulary entries exist at one time: 2**24 float32 are 64 MiB a buffer
LOGITS_PER_CHUNK = 2**24


class TokenTerms(NamedTuple):
    """What the loss and the log need of each token: `kl`, `log_probs` (both differentiable) and `entropy`; nats."""

    kl: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor


@dataclass
class Head:
    """
    An output head: `logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, or without the tanh.

    Args:
        weight (`torch.Tensor`): Shape `(V, H)`.
        bias (`torch.Tensor`, *optional*): Shape `(V,)`.
        scale (`float`, *optional*, defaults to 1.0): Factor some architectures put on the logits.
        softcap (`float`, *optional*): `final_logit_softcapping` of the architecture.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(N, V)` of hidden states `(N, H)`, in float32 (float64 where the hidden states are)."""
        logits = _matmul(hidden, self.weight)
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def guided_logits(
    head: Head, cond: torch.Tensor, uncond: torch.Tensor | None, guidance_scale: float
) -> Callable[[slice], torch.Tensor]:
    """
    The guided logits of a teacher, projected only for the rows that are asked for.

    Guidance is on the hidden states, one projection per row; on the logits where the head is not affine.

    Args:
        head (`Head`): The teacher's.
        cond (`torch.Tensor`): Conditional last hidden states, shape `(N, H)`.
        uncond (`torch.Tensor`, *optional*): Unconditional ones, same shape; `None` means no guidance.
        guidance_scale (`float`): gamma of Eq. (1).

    Returns:
        `Callable`: Maps a slice of the `N` rows to logits `(rows, V)`, float32 at least.
    """
    if uncond is None:
        return lambda rows: head.logits(cond[rows])
    if head.softcap is not None:
        return lambda rows: guide_logits(head.logits(cond[rows]), head.logits(uncond[rows]), guidance_scale)
    guided = guide_hidden_states(cond, uncond, guidance_scale)
    return lambda rows: head.logits(guided[rows])


def _matmul(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` in float32 or float64; under autocast on CUDA, from inputs of the autocast dtype."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        return torch.mm(hidden.to(dtype), weight.to(dtype).t(), out_dtype=torch.float32)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(dtype) @ weight.to(dtype).t()


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(student || teacher) of the next-token distributions `softmax(logits / temperature)`.

    The summand of Eq. (2) of https://huggingface.co/papers/2410.06084, over the whole vocabulary.

    Args:
        student_logits (`torch.Tensor`): Shape `(..., V)`.
        teacher_logits (`torch.Tensor`): Same shape; already guided.
        temperature (`float`, *optional*, defaults to 1.0): Divides both; above 0.

    Returns:
        `torch.Tensor`: Shape `(...)`, nats, in float32 (float64 where an input is float64). Infinite where the teacher
        forbids a token that the student allows.

    Raises:
        ValueError: If the shapes differ (two vocabularies cannot be compared) or `temperature` is not above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have one shape (the same vocabulary), got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = (student_logits.to(dtype) / temperature).log_softmax(-1)
    log_q = (teacher_logits.to(dtype) / temperature).log_softmax(-1)
    # A token without probability adds nothing, also where the log-ratio is -inf or NaN
    log_ratio = torch.where(log_p.isneginf(), 0.0, log_p - log_q)
    return (log_p.exp() * log_ratio).sum(-1)


class _TokenTermsFunction(torch.autograd.Function):
    """
    [`token_terms`] in chunks of rows: the `(N, V)` logits never exist in whole, forward or backward.

    With z the student's logits over T, p its probabilities, q the teacher's: d kl / d z_v = p_v (log p_v - log q_v -
    kl), d log_prob / d z_v = 1[v = id] - p_v. The backward pass projects again instead of keeping the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, teacher_logits, temperature, scale, softcap, rows):
        head = Head(weight, bias, scale, softcap)
        parts = []
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            log_p = (head.logits(hidden[chunk]) / temperature).log_softmax(-1)
            log_q = (teacher_logits(chunk) / temperature).log_softmax(-1)
            p = log_p.exp()
            kl = (p * (log_p - log_q)).sum(-1)
            entropy = -(p * log_p).sum(-1)
            parts.append((kl, log_p.gather(-1, ids[chunk, None]).squeeze(-1), entropy))
        kl, log_probs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, ids, kl)
        ctx.teacher_logits, ctx.settings = teacher_logits, (temperature, scale, softcap, rows)
        ctx.mark_non_differentiable(entropy)
        return kl, log_probs, entropy

    @staticmethod
    def backward(ctx, grad_kl, grad_log_probs, _):
        hidden, weight, bias, ids, kl = ctx.saved_tensors
        temperature, scale, softcap, rows = ctx.settings
        head = Head(weight, bias, scale, softcap)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = head.logits(hidden[chunk])
            log_p = (logits / temperature).log_softmax(-1)
            log_q = (ctx.teacher_logits(chunk) / temperature).log_softmax(-1)
            p = log_p.exp()
            log_p -= log_q
            log_p -= kl[chunk, None]
            log_p *= grad_kl[chunk, None]
            log_p -= grad_log_probs[chunk, None]
            grad = p.mul_(log_p)  # now d loss / d z but for the sampled token
            grad.scatter_add_(1, ids[chunk, None], grad_log_probs[chunk, None].to(grad.dtype))
            if softcap is not None:
                grad *= 1 - (logits / softcap) ** 2
            grad *= scale / temperature
            if grad_hidden is not None:
                grad_hidden[chunk] = _matmul(grad, weight.t())
            if grad_weight is not None:
                grad_weight += _matmul(grad.t(), hidden[chunk].t())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        as_given = [
            None if grad is None else grad.to(given.dtype)
            for grad, given in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        ]
        return (*as_given, None, None, None, None, None, None)


def token_terms(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> TokenTerms:
    """
    Reverse KL to the teacher, log-probability of the sampled token, and entropy, of each token; one projection for
    all.

    Equal to `reverse_kl(head.logits(hidden), teacher_logits(:), temperature)` and `log_softmax` of the same logits,
    but in chunks of tokens, so that memory does not grow with `N * V`. Gradients reach `hidden` and the head's
    parameters, never the teacher.

    Args:
        hidden (`torch.Tensor`): The student's last hidden states, shape `(N, H)`.
        head (`Head`): The student's output head.
        ids (`torch.Tensor`): The sampled tokens, int64, shape `(N,)`.
        teacher_logits (`Callable`): Maps a slice of the `N` rows to the guided teacher's logits `(rows, V)`.
        temperature (`float`, *optional*, defaults to 1.0): T of the softmax of both.
        logits_per_chunk (`int`, *optional*): Entries of the `(rows, V)` logits that may exist at one time.

    Returns:
        `TokenTerms`: `kl`, `log_probs`, `entropy`, each of shape `(N,)`, nats, float32 or float64.
    """
    if hidden.shape[0] == 0:
        # Keeps the graph connected where a process has no token to score
        nothing = (hidden.sum() + head.weight.sum()) * hidden.new_zeros(0)
        return TokenTerms(nothing, nothing, nothing.detach())
    rows = max(1, logits_per_chunk // head.weight.shape[0])
    return TokenTerms(
        *_TokenTermsFunction.apply(
            hidden, head.weight, head.bias, ids, teacher_logits, temperature, head.scale, head.softcap, rows
        )
    )


def sum_per_sequence(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sum token values over the steps and codebooks of each sequence.

    Args:
        values (`torch.Tensor`): One value per valid token, in the order of `mask`'s true entries, shape `(N,)`.
        mask (`torch.Tensor`): True where a token counts, shape `(B, S, K)`, with `N` true entries.

    Returns:
        `torch.Tensor`: Shape `(B,)`, the unit of `values`.
    """
    sequence = mask.nonzero()[:, 0]
    return values.new_zeros(mask.shape[0]).index_add(0, sequence, values)


def policy_gradient_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> torch.Tensor:
    """
    REINFORCE: `-mean(advantage * log p)`; with `old_log_probs`, RLOO's clipped surrogate of it.

    Eq. (4) of https://huggingface.co/papers/2410.06084. The surrogate `-mean(min(r A, clip(r) A))`, `r = p / p_old`,
    is for more than one update per rollout; at the first update both have one gradient.

    Args:
        log_probs (`torch.Tensor`): log p of each sampled sequence, nats, shape `(B,)`.
        advantages (`torch.Tensor`): Reward minus baseline, shape `(B,)`; no gradient flows through it.
        old_log_probs (`torch.Tensor`, *optional*): log p when the sequences were sampled, shape `(B,)`.
        epsilon_low (`float`, *optional*, defaults to 0.2): The ratio is clipped below `1 - epsilon_low`.
        epsilon_high (`float`, *optional*, defaults to 0.2): The ratio is clipped above `1 + epsilon_high`.

    Returns:
        `torch.Tensor`: Scalar.
    """
    advantages = advantages.detach()
    if old_log_probs is None:
        return -(advantages * log_probs).mean()
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
