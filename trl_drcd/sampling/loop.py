"""
The decode loop for all model families.

Letters: `B` sequences, `R` rows in the batch (`2B` with guidance), `S` steps, `K` codebooks, `V` vocabulary, `H`
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trl_drcd.guidance import EarlySteps
from trl_drcd.losses import Head, guided_logits
from trl_drcd.sampling.drawing import draw
from trl_drcd.sampling.packed import packed_head
from trl_drcd.sampling.streams import Stream

SYNCHRONISED = 8  # on an accelerator, steps between two checks for finished sequences, which synchronise with the CPU
ENDED_SHARE = 0.25  # finished share of the batch from which removing these rows costs less than keeping them


@dataclass
class Rollout:
    """
    Sampled completions.

    Args:
        ids (`torch.Tensor`): int64, shape `(B, <= S, K)`; the fill id where no token was drawn.
        log_probs (`torch.Tensor`): Log-probabilities under the sampled distribution, nats, same shape; 0 where no
            token was drawn.
        drawn (`torch.Tensor`): Whether a token was drawn, boolean, same shape.
        finite (`torch.Tensor`): Whether all logits of a sequence were finite, boolean, shape `(B,)`; tokens with
            non-finite logits were drawn uniformly.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    drawn: torch.Tensor
    finite: torch.Tensor

    def completions(self) -> list[list[int]]:
        """Ids of each sequence up to its last drawn step, the `K` ids of a step next to each other."""
        steps = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        lengths = (self.drawn.any(2) * steps).amax(1).tolist()
        rows: list[list[list[int]]] = self.ids.tolist()
        return [[token for step in row[:length] for token in step] for row, length in zip(rows, lengths, strict=True)]


def check_sampling(steps: int, temperature: float) -> None:
    """
    Check the arguments of sampling.

    Raises:
        ValueError: If `temperature` is not above 0 or `steps` is below 1.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if steps < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {steps}")


def joined(heads: Sequence[Head], token_ids: torch.Tensor | None = None) -> Head:
    """
    Stack `K` heads into one with `K * V` rows, in the dtype of their projection.

    Args:
        heads (`Sequence[Head]`): Heads that differ in weight and bias only. `V` is the size of the largest; the rows
            that others lack are zeros.
        token_ids (`torch.Tensor`, *optional*): Keep only the rows of these tokens, int64 `(V',)`; by default of those
            that the heads allow.

    Returns:
        [`Head`]: Without gradient.

    Raises:
        ValueError: If the heads differ in scale or soft cap, or only some have a bias.
    """
    token_ids = heads[0].token_ids if token_ids is None else token_ids
    first = replace(heads[0], token_ids=None)
    if any((h.scale, h.softcap, h.bias is None) != (first.scale, first.softcap, first.bias is None) for h in heads):
        raise ValueError("the heads of a model must be alike but for their weights")
    dtype = torch.promote_types(first.weight.dtype, torch.float32)
    if first.weight.is_cuda and first.compute_dtype is not None:
        dtype = first.compute_dtype

    longest = max(len(head.weight) for head in heads)

    def rows(parameters: list) -> torch.Tensor:
        chosen = [p.detach() if token_ids is None else p.detach()[token_ids] for p in parameters]
        if token_ids is None:
            chosen = [torch.cat([p, p.new_zeros(longest - len(p), *p.shape[1:])]) for p in chosen]
        return (chosen[0] if len(chosen) == 1 else torch.cat(chosen)).to(dtype)

    bias = None if first.bias is None else rows([head.bias for head in heads])
    return replace(first, weight=rows([head.weight for head in heads]), bias=bias)


def _lacking(heads: Sequence[Head], token_ids: torch.Tensor | None) -> torch.Tensor | None:
    """The rows of [`joined`] that a head does not have, boolean `(K, V)`; `None` if all heads are of one size."""
    sizes = torch.tensor([len(head.weight) for head in heads], device=heads[0].weight.device)
    if token_ids is not None or (sizes == sizes[0]).all():
        return None
    return torch.arange(int(sizes.amax()), device=sizes.device) >= sizes[:, None]


@torch.no_grad()
def decode(
    stream: Stream,
    heads: Sequence[Head],
    steps: int,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    eos_token_ids: Sequence[int] = (),
    fill: int = 0,
    layout: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    after_end: torch.Tensor | None = None,
    early: EarlySteps | None = None,
) -> Rollout:
    """
    Sample without truncation or penalties, with classifier-free guidance if `guidance_scale` is not 1.

    With guidance, the first half of the stream's rows is conditional and the second half, in the same order,
    unconditional; both get the same tokens. The random numbers of a sequence do not depend on when the others end.
    Finished sequences are removed from the batch once they make up a quarter of it.

    Args:
        stream ([`Stream`]): The model and its prompts, `R` rows.
        heads (`Sequence[Head]`): The `K` output heads.
        steps (`int`): Maximum number of steps `S`, at least 1.
        guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1).
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
        eos_token_ids (`Sequence[int]`, *optional*): Tokens that end a sequence.
        fill (`int`, *optional*, defaults to 0): Id where no token is drawn.
        layout (`torch.Tensor`, *optional*): Positions where tokens are drawn, boolean `(S, K)`; all by default.
        token_ids (`torch.Tensor`, *optional*): Restrict sampling to these tokens, int64 `(V',)`; by default to those
            that the heads allow.
        after_end (`torch.Tensor`, *optional*): Steps for which each codebook is still drawn after the step of an eos,
            int64 `(K,)`; -1 for a codebook that is not drawn in that step either. 0 for all by default.
        early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

    Returns:
        [`Rollout`]: On the stream's device.

    Raises:
        ValueError: If `temperature` is not above 0, `steps` is below 1, or the heads differ in more than weight and
            bias.
    """
    check_sampling(steps, temperature)
    token_ids = heads[0].token_ids if token_ids is None else token_ids
    guided, books, head = guidance_scale != 1, len(heads), packed_head(joined(heads, token_ids))
    hidden = stream.start()
    device, sequences = hidden.device, len(hidden) // (1 + guided)
    ids = torch.full((sequences, steps, books), fill, device=device)
    log_probs = torch.zeros(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=device)
    drawn = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    finite = torch.ones(sequences, dtype=torch.bool, device=device)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    rows = torch.arange(sequences, device=device)  # indices of the sequences still in the batch
    ended = torch.full((sequences,), steps, device=device)  # the step of each one's eos
    after = torch.zeros(books, dtype=torch.long, device=device) if after_end is None else after_end.to(device)
    lacking = _lacking(heads, token_ids)
    for step in range(steps):
        cond, uncond = hidden.chunk(2) if guided else (hidden, None)
        scale = early.scale_at(step, guidance_scale) if early else guidance_scale
        logits = guided_logits(head, cond, uncond, scale)(slice(None))
        if lacking is not None:
            logits = logits.view(-1, *lacking.shape).masked_fill(lacking, -torch.inf)
        uniform = torch.rand(sequences, books, dtype=torch.float64, device=device)[rows].flatten()
        new = draw(logits.view(len(uniform), -1), uniform, temperature)
        tokens = new.tokens if token_ids is None else token_ids[new.tokens]
        tokens = tokens.view(-1, books)
        counts = step <= ended[:, None] + after
        if layout is not None:
            counts = counts & layout[step]
        if len(eos):
            ends = (torch.isin(tokens, eos) & counts).any(1)
            ended = ended.where(~ends, step)
            counts = counts & (step <= ended[:, None] + after)
        tokens = tokens.where(counts, fill)
        ids[rows, step], drawn[rows, step] = tokens, counts
        log_probs[rows, step] = new.log_probs.view(-1, books).to(log_probs).where(counts, 0.0)
        finite[rows] &= (new.finite.view(-1, books) | ~counts).all(1)
        if step + 1 == steps:
            break
        if len(eos):
            running = step < ended + after.amax()
            if device.type == "cpu" or (step + 1) % SYNCHRONISED == 0:
                left = int(running.sum())
                if left == 0:
                    break
                if not stream.fixed_rows and len(rows) - left >= ENDED_SHARE * len(rows):
                    kept = running.nonzero().squeeze(1)
                    stream.keep(torch.cat([kept, kept + len(rows)]) if guided else kept)
                    rows, tokens, ended = rows[kept], tokens[kept], ended[kept]
        hidden = stream.step(tokens.repeat(2, 1) if guided else tokens)
    done = int((drawn.any(2).any(0) * torch.arange(1, steps + 1, device=device)).amax())
    return Rollout(ids[:, :done], log_probs[:, :done], drawn[:, :done], finite)
