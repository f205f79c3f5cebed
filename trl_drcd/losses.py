"""
Per-token terms of the joint objective, and its loss terms. Pure functions of tensors.

Letters: `B` sequences, `S` steps, `K` codebooks (1 for a text LM), `N` scored tokens, `V` vocabulary, `H` hidden size.
KL, log-probabilities and entropy are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from trl_drcd.guidance import guide_hidden_states, guide_logits
from trl_drcd.heads import Head, TokenTerms, TokenTermsFunction, WeightedTerms, WeightedTermsFunction, kl_summands

# Maximum size (tokens x vocabulary) of a chunk of logits: 2**24 float32 values are 64 MiB per buffer
LOGITS_PER_CHUNK = 2**24


def guided_logits(
    head: Head, cond: torch.Tensor, uncond: torch.Tensor | None, guidance_scale: float | torch.Tensor
) -> Callable[[slice], torch.Tensor]:
    """
    The guided logits of a teacher, projected only for the requested rows.

    Guidance is applied to the hidden states, with one projection per row; if the head is not affine, to the logits.

    Args:
        head (`Head`): The teacher's head.
        cond (`torch.Tensor`): Conditional last hidden states, shape `(N, H)`.
        uncond (`torch.Tensor`, *optional*): Unconditional hidden states, same shape; `None` means no guidance.
        guidance_scale (`float` or `torch.Tensor`): gamma of Eq. (1); of each row, shape `(N, 1)`, if a tensor.

    Returns:
        `Callable`: Maps a slice of the `N` rows to logits `(rows, V)`, float32 or float64.
    """
    head = head.sliced()
    if uncond is None:
        return lambda rows: head.logits(cond[rows])
    if head.softcap is not None:

        def guided_rows(rows: slice) -> torch.Tensor:
            scale = guidance_scale[rows] if isinstance(guidance_scale, torch.Tensor) else guidance_scale
            return guide_logits(head.logits(cond[rows]), head.logits(uncond[rows]), scale)

        return guided_rows
    guided = guide_hidden_states(cond, uncond, guidance_scale)
    return lambda rows: head.logits(guided[rows])


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(student || teacher) of the next-token distributions `softmax(logits / temperature)`.

    The summand of Eq. (2) of https://huggingface.co/papers/2410.06084, over the whole vocabulary.

    Args:
        student_logits (`torch.Tensor`): Shape `(..., V)`.
        teacher_logits (`torch.Tensor`): Guided logits, same shape.
        temperature (`float`, *optional*, defaults to 1.0): T of both softmaxes; above 0.

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
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    log_p = (student_logits.to(dtype) / temperature).log_softmax(-1)
    log_q = (teacher_logits.to(dtype) / temperature).log_softmax(-1)
    return kl_summands(log_p, log_q).sum(-1)


def token_terms(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> TokenTerms:
    """
    Reverse KL to the teacher, log-probability of the sampled token, and entropy, for each token, from one projection.

    Equal to `reverse_kl(head.logits(hidden), teacher_logits(:), temperature)` and `log_softmax` of the same logits,
    but in chunks of tokens, so that memory does not grow with `N * V`. Gradients flow to `hidden` and the head's
    parameters, not to the teacher.

    Args:
        hidden (`torch.Tensor`): The student's last hidden states, shape `(N, H)`.
        head (`Head`): The student's output head.
        ids (`torch.Tensor`): The sampled tokens, int64, shape `(N,)`.
        teacher_logits (`Callable`): Maps a slice of the `N` rows to the guided teacher's logits `(rows, V)`.
        temperature (`float`, *optional*, defaults to 1.0): T of both softmaxes.
        logits_per_chunk (`int`, *optional*): Maximum number of entries of a chunk of logits `(rows, V)`.

    Returns:
        `TokenTerms`: `kl`, `log_probs`, `entropy`, each of shape `(N,)`, nats, float32 (float64 if `hidden` is).

    Raises:
        ValueError: If student and teacher have different vocabulary sizes.
    """
    head = head.sliced()
    if hidden.shape[0] == 0:
        # Keep all parameters in the graph even if this process has no token to score: the others wait for gradients
        bias = 0.0 if head.bias is None else head.bias.sum()
        nothing = (hidden.sum() + head.weight.sum() + bias) * hidden.new_zeros(0)
        return TokenTerms(nothing, nothing, nothing.detach())
    rows = max(1, logits_per_chunk // head.weight.shape[0])
    return TokenTerms(
        *TokenTermsFunction.apply(hidden, head.weight, head.bias, ids, teacher_logits, head, temperature, rows)
    )


def weighted_terms(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    kl_weights: torch.Tensor,
    log_prob_weights: torch.Tensor,
    temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> WeightedTerms:
    """
    `sum_n kl_weight_n kl_n + log_prob_weight_n log_prob_n` of [`token_terms`], for weights that are known in advance.

    The gradient is computed in the forward pass, so that no chunk is projected twice. This takes two thirds of the
    projections of [`token_terms`] and its backward pass. Eq. (5) has this form with one update per rollout.

    Args:
        hidden, head, ids, teacher_logits, temperature, logits_per_chunk: As in [`token_terms`].
        kl_weights (`torch.Tensor`): Shape `(N,)`.
        log_prob_weights (`torch.Tensor`): Shape `(N,)`.

    Returns:
        `WeightedTerms`: `loss`, a scalar, differentiable with respect to `hidden` and the head's parameters; `kl`,
        `log_probs` and `entropy`, each of shape `(N,)`, nats, without gradient.

    Raises:
        ValueError: If student and teacher have different vocabulary sizes.
    """
    head = head.sliced()
    if hidden.shape[0] == 0:
        terms = token_terms(hidden, head, ids, teacher_logits)
        return WeightedTerms(terms.kl.sum(), *(term.detach() for term in terms))
    rows = max(1, logits_per_chunk // head.weight.shape[0])
    return WeightedTerms(
        *WeightedTermsFunction.apply(
            hidden,
            head.weight,
            head.bias,
            ids,
            teacher_logits,
            head,
            kl_weights,
            log_prob_weights,
            temperature,
            rows,
        )
    )


def sum_per_sequence(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sum token values over the steps and codebooks of each sequence.

    Args:
        values (`torch.Tensor`): One value per scored token, in the order of the True entries of `mask`, shape `(N,)`.
        mask (`torch.Tensor`): True where a token is scored, shape `(B, S, K)`, with `N` True entries.

    Returns:
        `torch.Tensor`: Shape `(B,)`, the unit of `values`.
    """
    sequence = mask.nonzero()[:, 0]
    return values.new_zeros(mask.shape[0]).index_add(0, sequence, values)


class BatchTerms(NamedTuple):
    """
    The terms of a batch, in nats.

    `kl` and `entropy`, summed over the tokens of each sequence, shape `(B,)`; `log_probs` of the sampled tokens, shape
    `(B, S, K)`, 0 where no token is scored; `tokens`, the number of scored tokens, shape `(B,)`; `loss`, a
    differentiable scalar, if the weights were known in advance: the other terms are then detached. Otherwise `None`.
    """

    kl: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    loss: torch.Tensor | None


def batch_terms(
    hidden: torch.Tensor,
    heads: list[Head],
    ids: torch.Tensor,
    mask: torch.Tensor,
    teacher_logits: Callable[[int], Callable[[slice], torch.Tensor]],
    temperature: float,
    log_prob_weights: torch.Tensor | None = None,
) -> BatchTerms:
    """
    The terms of a batch, from one student forward.

    With `log_prob_weights` w, the gradient of `mean over sequences of sum over tokens (kl + w log p)` is computed in
    the forward pass, at a lower cost ([`weighted_terms`]).

    Args:
        hidden (`torch.Tensor`): The student's last hidden states, shape `(B, S, H)`, or `(B, S, K, H)` if each
            codebook has its own.
        heads (`list[Head]`): The student's `K` heads.
        ids (`torch.Tensor`): The sampled tokens, int64, shape `(B, S, K)`.
        mask (`torch.Tensor`): True where a token is scored, shape `(B, S, K)`.
        teacher_logits (`Callable`): Maps a codebook to a function from a slice of its scored tokens, in the order of
            `mask[..., k]`, to the guided teacher's logits.
        temperature (`float`): T of both softmaxes.
        log_prob_weights (`torch.Tensor`, *optional*): Shape `(B, S, K)`, or broadcastable to it.

    Returns:
        `BatchTerms`: Its `kl` and `log_probs` are differentiable if `log_prob_weights` is `None`; otherwise only its
        `loss` is.

    Raises:
        ValueError: If student and teacher have different vocabulary sizes.
    """
    terms: list[TokenTerms] = []
    losses: list[torch.Tensor] = []
    for k, head in enumerate(heads):
        scored = mask[..., k]
        own = hidden if hidden.ndim == 3 else hidden[:, :, k]
        tokens = own[scored], head, ids[..., k][scored], teacher_logits(k)
        if log_prob_weights is None:
            terms.append(token_terms(*tokens, temperature))
        else:
            weights = log_prob_weights.expand(mask.shape)[..., k][scored]
            loss, *rest = weighted_terms(*tokens, torch.ones_like(weights), weights, temperature)
            terms.append(TokenTerms(*rest))
            losses.append(loss)
    of_sequences = [
        torch.stack([sum_per_sequence(term, mask[..., k, None]) for k, term in enumerate(of)]).sum(0)
        for of in ([term.kl for term in terms], [term.entropy for term in terms])
    ]
    log_probs = torch.stack([_spread(term.log_probs, mask[..., k]) for k, term in enumerate(terms)], dim=-1)
    total = (torch.stack(losses).sum() / len(mask)).to(of_sequences[0].dtype) if losses else None
    return BatchTerms(of_sequences[0], log_probs, of_sequences[1], mask.sum(dim=(1, 2)), total)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scatter values to the True entries of `mask`, with 0 elsewhere; differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def policy_gradient_losses(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> torch.Tensor:
    """
    REINFORCE loss of each sequence, `-advantage * log p`; with `old_log_probs`, RLOO's clipped surrogate.

    Eq. (4) of https://huggingface.co/papers/2410.06084. The surrogate `-min(r A, clip(r) A)`, `r = p / p_old`, is for
    several updates per rollout; at the first update, both losses have the same gradient. With per-token advantages,
    shape `(B, S, K)`, each token has its own ratio, and the losses are summed over the tokens of a sequence.

    Args:
        log_probs (`torch.Tensor`): log p of each sampled sequence, nats, shape `(B,)`; or of each token, `(B, S, K)`.
        advantages (`torch.Tensor`): Reward minus baseline, same shape; detached.
        old_log_probs (`torch.Tensor`, *optional*): log p at sampling time, nats, same shape.
        epsilon_low (`float`, *optional*, defaults to 0.2): Lower clipping bound of the ratio is `1 - epsilon_low`.
        epsilon_high (`float`, *optional*, defaults to 0.2): Upper clipping bound of the ratio is `1 + epsilon_high`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, in the unit of the advantages.
    """
    advantages = advantages.detach()
    if old_log_probs is None:
        return -(advantages * log_probs).flatten(1).sum(1) if log_probs.ndim > 1 else -advantages * log_probs
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def policy_gradient_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> torch.Tensor:
    """The mean of [`policy_gradient_losses`] over sequences, a scalar."""
    return policy_gradient_losses(log_probs, advantages, old_log_probs, epsilon_low, epsilon_high).mean()


@torch.no_grad()
def token_log_probs(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> torch.Tensor:
    """
    Log-probability of each token, in chunks of tokens and without gradient: only the `log_probs` of [`token_terms`].

    Args:
        hidden (`torch.Tensor`): Last hidden states, shape `(N, H)`.
        head (`Head`): The output head.
        ids (`torch.Tensor`): The tokens, int64, shape `(N,)`.
        temperature (`float`, *optional*, defaults to 1.0): T of the softmax; above 0.
        logits_per_chunk (`int`, *optional*): Maximum number of entries of a chunk of logits `(rows, V)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`, nats, float32 or float64; `-inf` if the token has probability 0.

    Raises:
        ValueError: If `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    head = head.sliced()
    rows = max(1, logits_per_chunk // head.weight.shape[0])
    log_probs = torch.empty(len(ids), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(ids), rows):
        chunk = slice(start, start + rows)
        logits = head.logits(hidden[chunk])
        log_probs[chunk] = (logits / temperature).log_softmax(-1).gather(-1, ids[chunk, None]).squeeze(-1)
    return log_probs


@torch.no_grad()
def batch_log_probs(
    hidden: torch.Tensor, heads: list[Head], ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    Log-probability of each sampled token of a batch, without gradient: [`token_log_probs`] for each codebook.

    Args:
        hidden (`torch.Tensor`): Last hidden states, shape `(B, S, H)`, or `(B, S, K, H)`.
        heads (`list[Head]`): The `K` heads.
        ids (`torch.Tensor`): The sampled tokens, int64, shape `(B, S, K)`.
        mask (`torch.Tensor`): True where a token is scored, shape `(B, S, K)`.
        temperature (`float`, *optional*, defaults to 1.0): T of the softmax.

    Returns:
        `torch.Tensor`: Nats, shape `(B, S, K)`; 0 where no token is scored.
    """
    of_codebooks = []
    for k, head in enumerate(heads):
        scored = mask[..., k]
        own = hidden if hidden.ndim == 3 else hidden[:, :, k]
        of_codebooks.append(_spread(token_log_probs(own[scored], head, ids[..., k][scored], temperature), scored))
    return torch.stack(of_codebooks, dim=-1)
