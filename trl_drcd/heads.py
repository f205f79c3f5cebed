"""
Output heads, and per-token loss terms computed in chunks of rows, so that the full `(N, V)` logits are never stored.

Letters: `N` scored tokens, `V` vocabulary, `H` hidden size. KL, log-probabilities and entropy are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from trl_drcd.compat.products import add_product, linear


class TokenTerms(NamedTuple):
    """Terms of each token, shape `(N,)`, nats: `kl` and `log_probs`, both differentiable, and `entropy`."""

    kl: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor


class WeightedTerms(NamedTuple):
    """The weighted sum of the token terms, a differentiable scalar, and the terms, shape `(N,)`, detached; nats."""

    loss: torch.Tensor
    kl: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor


def _cuda_autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


@dataclass
class Head:
    """
    An output head: `logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; without `softcap`, no
    tanh.

    Args:
        weight (`torch.Tensor`): Shape `(V, H)`.
        bias (`torch.Tensor`, *optional*): Shape `(V,)`.
        scale (`float`, *optional*, defaults to 1.0): Factor that some architectures apply to the logits.
        softcap (`float`, *optional*): `final_logit_softcapping` of the architecture.
        compute_dtype (`torch.dtype`, *optional*): On CUDA, the dtype to which the inputs of the projection are
            rounded; sums and results stay float32. Defaults to autocast's dtype if the head is created under autocast.
            On a CPU the projection is in float32.
        token_ids (`torch.Tensor`, *optional*): The tokens that are allowed, int64 `(V',)`: `V` is then `V'` in all
            that is computed from this head, and token ids are places among them. All by default.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    compute_dtype: torch.dtype | None = field(default_factory=_cuda_autocast_dtype)
    token_ids: torch.Tensor | None = None

    def sliced(self) -> Head:
        """The head with the rows of the allowed tokens alone; itself where all are allowed. Differentiable."""
        if self.token_ids is None:
            return self
        bias = None if self.bias is None else self.bias.index_select(0, self.token_ids)
        return replace(self, weight=self.weight.index_select(0, self.token_ids), bias=bias, token_ids=None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(N, V)` of hidden states `(N, H)`, in float32 (float64 if the hidden states are float64)."""
        own = self.sliced()
        if hidden.is_cuda and self.compute_dtype is not None:
            inputs = hidden.to(self.compute_dtype), own.weight.to(self.compute_dtype).t()
            logits = torch.mm(*inputs, out_dtype=torch.float32)
        else:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = own.product(hidden.to(dtype), own.weight.to(dtype))
        if own.bias is not None:
            logits = logits + own.bias.to(logits.dtype)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def product(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`hidden @ weight.T`, on a CPU."""
        return linear(hidden, weight)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """`total += left @ right` in the precision of the logits; `total` is float32 or float64."""
        if total.is_cuda and self.compute_dtype is not None:
            inputs = left.to(self.compute_dtype), right.to(self.compute_dtype)
            torch.addmm(total, *inputs, out_dtype=torch.float32, out=total)
        else:
            add_product(total, left, right.to(total.dtype))


def stack_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits `(N, K, V)` of `K` heads, from `(N, V_k)` of each; `V` is the largest, and -inf what a head lacks."""
    longest = max(own.shape[1] for own in logits)
    fill = -torch.inf
    return torch.stack(
        [torch.nn.functional.pad(own, (0, longest - own.shape[1]), value=fill) for own in logits], dim=1
    )


def kl_summands(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """
    The summands `p log(p / q)` of KL(p || q).

    0 where p is 0; infinite where q is 0 and p is not, even if `p` underflows.

    Args:
        log_p (`torch.Tensor`): Log-probabilities, nats, shape `(..., V)`.
        log_q (`torch.Tensor`): Same shape.

    Returns:
        `torch.Tensor`: Same shape, nats; differentiable where it is finite.
    """
    log_ratio = torch.where(log_p.isneginf(), 0.0, log_p - log_q)
    summands = log_p.exp() * log_ratio
    return torch.where(log_ratio.isposinf(), torch.inf, summands)


def chunk_terms(head: Head, hidden, ids, teacher_logits, temperature):
    """
    The terms of some rows, and the tensors needed for their gradient: the student's logits, its probabilities p, and
    p log(p / q), where q are the teacher's probabilities; each `(rows, V)`.

    Works in place where possible: on a CPU, the passes over `(rows, V)` cost about as much as the projections.
    """
    logits = head.logits(hidden)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"student and teacher must have the same vocabulary, got {logits.shape[-1]} and "
            f"{teacher_logits.shape[-1]} tokens"
        )
    teacher_logits = teacher_logits.to(logits.dtype)
    log_p = (logits / temperature).log_softmax(-1)
    log_ratio = (teacher_logits / temperature).log_softmax(-1)
    torch.sub(log_p, log_ratio, out=log_ratio)
    p = log_p.exp()
    weighted_log_ratio = log_ratio.mul_(p)
    log_probs = log_p.gather(-1, ids[:, None]).squeeze(-1)
    entropy = -log_p.mul_(p).sum(-1)
    kl = weighted_log_ratio.sum(-1)
    if not (kl + entropy).isfinite().all():  # tokens of probability 0 give NaN in the passes above
        log_p, log_q = ((z / temperature).log_softmax(-1) for z in (logits, teacher_logits))
        weighted_log_ratio = kl_summands(log_p, log_q)
        kl = weighted_log_ratio.sum(-1)
        entropy = -torch.where(log_p.isneginf(), 0.0, p * log_p).sum(-1)
    return TokenTerms(kl, log_probs, entropy), logits, p, weighted_log_ratio


class HeadGradients:
    """
    Gradients of `sum_n kl_weight_n kl_n + log_prob_weight_n log_prob_n` by hidden states, weight and bias of a head.

    With z the student's logits over T: d kl / d z_v = p_v (log p_v - log q_v - kl), d log_prob / d z_v = 1[v = id] -
    p_v.
    """

    def __init__(self, hidden, head: Head, needed: Sequence[bool], temperature: float):
        given = hidden, head.weight, head.bias
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.head, self.temperature, self.dtypes = head, temperature, [None if x is None else x.dtype for x in given]
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip(given, needed, strict=True)
        )

    def add(self, chunk: slice, hidden, ids, kl_weights, log_prob_weights, kl, logits, p, weighted_log_ratio):
        """Add the rows of one chunk, from the outputs of `chunk_terms`, which are overwritten."""
        slope = self.head.scale / self.temperature  # d z / d (hidden @ weight.T + bias), without the soft cap
        kl_weights, log_prob_weights = (slope * w[:, None].to(p.dtype) for w in (kl_weights, log_prob_weights))
        grad = weighted_log_ratio.mul_(kl_weights)
        grad.addcmul_(p, kl_weights * kl[:, None] + log_prob_weights, value=-1)
        grad.scatter_add_(1, ids[:, None], log_prob_weights)
        if self.head.softcap is not None:
            grad *= 1 - (logits / self.head.softcap) ** 2
        if self.hidden is not None:
            self.head.add_product(self.hidden[chunk], grad, self.head.weight)
        if self.weight is not None:
            self.head.add_product(self.weight, grad.t(), hidden)
        if self.bias is not None:
            self.bias += grad.sum(0)

    def as_given(self) -> list[torch.Tensor | None]:
        """The gradients in the dtypes of hidden states, weight and bias."""
        grads = self.hidden, self.weight, self.bias
        return [None if g is None else g.to(dtype) for g, dtype in zip(grads, self.dtypes, strict=True)]


def chunks_of(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


class TokenTermsFunction(torch.autograd.Function):
    """
    [`~trl_drcd.losses.token_terms`] in chunks of rows: neither forward nor backward stores the full `(N, V)` logits.

    The backward pass recomputes the projection instead of keeping the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, teacher_logits, head, temperature, rows):
        chunks = chunks_of(hidden.shape[0], rows)
        parts = [chunk_terms(head, hidden[c], ids[c], teacher_logits(c), temperature)[0] for c in chunks]
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.teacher_logits, ctx.settings = teacher_logits, (head, temperature, chunks)
        terms = TokenTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))
        ctx.mark_non_differentiable(terms.entropy)
        return tuple(terms)

    @staticmethod
    def backward(ctx, grad_kl, grad_log_probs, _):
        hidden, weight, bias, ids = ctx.saved_tensors
        head, temperature, chunks = ctx.settings
        head = replace(head, weight=weight, bias=bias)
        grads = HeadGradients(hidden, head, ctx.needs_input_grad[:3], temperature)
        for c in chunks:
            terms, *parts = chunk_terms(head, hidden[c], ids[c], ctx.teacher_logits(c), temperature)
            grads.add(c, hidden[c], ids[c], grad_kl[c], grad_log_probs[c], terms.kl, *parts)
        return (*grads.as_given(), None, None, None, None, None)


class WeightedTermsFunction(torch.autograd.Function):
    """[`~trl_drcd.losses.weighted_terms`] in chunks of rows; the forward pass also computes each chunk's gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, teacher_logits, head, kl_weights, log_prob_weights, temperature, rows):
        needed = ctx.needs_input_grad[:3]
        grads = HeadGradients(hidden, head, needed, temperature)
        all_terms = []
        for c in chunks_of(hidden.shape[0], rows):
            terms, *parts = chunk_terms(head, hidden[c], ids[c], teacher_logits(c), temperature)
            all_terms.append(terms)
            if any(needed):
                grads.add(c, hidden[c], ids[c], kl_weights[c], log_prob_weights[c], terms.kl, *parts)
        ctx.grads = grads.as_given()
        kl, log_probs, entropy = (torch.cat(part) for part in zip(*all_terms, strict=True))
        ctx.mark_non_differentiable(kl, log_probs, entropy)
        return (kl_weights * kl + log_prob_weights * log_probs).sum(), kl, log_probs, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = [None if grad is None else grad * grad_loss for grad in ctx.grads]
        return (*grads, None, None, None, None, None, None, None)
