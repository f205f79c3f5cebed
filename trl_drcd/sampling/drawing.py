"""
Draw tokens from logits by inverse transform sampling.

Letters: `N` draws, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128  # tokens per block of the two-level search: about the square root of a large vocabulary


class Drawn(NamedTuple):
    """Tokens `(N,)`, their log-probabilities in nats `(N,)`, and whether the row's logits were finite `(N,)`."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    finite: torch.Tensor


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0) -> Drawn:
    """
    Draw one token per row from `softmax(logits / temperature)`: the first whose cumulative probability exceeds
    `uniform`.

    The cumulative distribution is computed in two levels, over blocks of tokens and inside the selected block, so that
    no float64 array of the size of the logits is needed. (`torch.multinomial` draws a random number per token.) A
    token with probability 0 is never drawn. If a row has NaN or no finite maximum, its token is drawn uniformly.

    Args:
        logits (`torch.Tensor`): Shape `(N, V)`, float32 or float64; overwritten.
        uniform (`torch.Tensor`): In `[0, 1)`, float64, shape `(N,)`.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.

    Returns:
        [`Drawn`]: Tokens, their log-probabilities in nats, and whether each row was finite; each of shape `(N,)`.
    """
    rows, vocabulary = logits.shape
    p = logits.div_(temperature).softmax(-1)
    padded = torch.nn.functional.pad(p, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else p
    blocks = padded.view(rows, -1, BLOCK)
    block, rest = _invert(blocks.sum(-1), uniform[:, None])
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1)
    token, _ = _invert(inside, rest)
    tokens = (block * BLOCK + token).squeeze(1).clamp(max=vocabulary - 1)
    log_probs = p.gather(1, tokens[:, None]).squeeze(1).log()
    finite = log_probs.isfinite()
    anything = (uniform * vocabulary).long().clamp(max=vocabulary - 1)
    return Drawn(tokens.where(finite, anything), log_probs, finite)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The first index whose cumulative weight exceeds `uniform` times the sum, and the relative position inside it.

    Args:
        weights (`torch.Tensor`): Not negative, shape `(N, M)`.
        uniform (`torch.Tensor`): In `[0, 1)`, float64, shape `(N, 1)`.

    Returns:
        `tuple`: Indices, int64 `(N, 1)`, and the position inside that index's weight, in `[0, 1)`, `(N, 1)`.
    """
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Rounding must not give the total itself, which no index exceeds
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulated, target, right=True).clamp(max=weights.shape[1] - 1)
    share = weights.gather(1, index).double()
    return index, ((target - (cumulated.gather(1, index) - share)) / share).clamp(0, 1)
