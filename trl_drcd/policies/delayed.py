"""
The layout of Dia's completions, and its decoding stream.

Letters: `B` sequences, `R` rows in the batch (twice the sequences with guidance), `S` steps, `K` codebooks, `T` frames
of a sequence, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trl_drcd.sampling import CrossAttentionStream


class DelayedLayout:
    """
    Delayed codebooks of which the first can end a sequence at any frame.

    A flat completion has the `K` ids of each step next to each other. Codebook `k` has the code of frame `t` at step
    `t + delays[k]`. Codebook 0 alone can draw the eos: drawn at step `T`, it ends every codebook after frame `T - 1`.
    All other positions hold the pad id. Nothing is drawn or scored there; the decoder reads bos before the first frame
    of a codebook, eos after its last, and then pad.

    Args:
        delays (`Sequence[int]`): Delay of each codebook, steps; the first is 0.
        eos_id (`int`): The first id after those of the codes.
        pad_id, bos_id (`int`): Above `eos_id`.

    Raises:
        ValueError: If the delays or ids are not so.
    """

    def __init__(self, delays: Sequence[int], eos_id: int, pad_id: int, bos_id: int):
        self.delays = torch.tensor(list(delays))
        self.eos_id, self.pad_id, self.bos_id = eos_id, pad_id, bos_id
        if self.delays[0] != 0 or self.delays.min() < 0:
            raise ValueError(
                f"`delay_pattern={list(delays)}` of the model must start with 0, as codebook 0 ends a sequence, and "
                "must not be negative"
            )
        if not eos_id < min(pad_id, bos_id):
            raise ValueError(
                f"`eos_token_id={eos_id}` of the model's decoder must be the first id after the codes, below "
                f"`pad_token_id={pad_id}` and `bos_token_id={bos_id}`"
            )

    @property
    def after_end(self) -> torch.Tensor:
        """Steps for which each codebook is drawn after that of the eos, int64 `(K,)`: see [`decode`]."""
        return (self.delays - 1).index_fill(0, torch.tensor([0]), 0)

    def steps(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Reshape `(B, S * K)`, possibly right-padded, to `(B, S, K)`."""
        books = len(self.delays)
        steps = completion_ids.shape[1] // books
        return completion_ids[:, : steps * books].unflatten(1, (steps, books))

    def is_drawn(self, steps: int) -> torch.Tensor:
        """Positions that may be drawn in a number of steps, boolean `(S, K)`: those of whole frames."""
        frame = torch.arange(steps)[:, None] - self.delays
        return (frame >= 0) & (frame < steps - self.delays.max())

    def inputs(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """What the decoder reads before each step of flat completions, int64 `(B, S, K)`."""
        steps = self.steps(completion_ids)
        ends = (steps[..., 0] < self.eos_id).long().cumprod(1).sum(1)
        begin = torch.full_like(steps[:, :1], self.bos_id)
        return torch.cat([begin, self.read(steps[:, :-1], ends)], dim=1)

    def read(self, steps: torch.Tensor, ends: torch.Tensor, first: int = 0) -> torch.Tensor:
        """
        What the decoder reads of some steps: their codes, and bos, eos and pad around these.

        Args:
            steps (`torch.Tensor`): Ids of completions, int64 `(B, S, K)`.
            ends (`torch.Tensor`): Frames `T` of each sequence, int64 `(B,)`; at least the number of all steps where it
                has not ended.
            first (`int`, *optional*, defaults to 0): Number of the first of these steps.

        Returns:
            `torch.Tensor`: int64 `(B, S, K)`.
        """
        numbers = torch.arange(first, first + steps.shape[1], device=steps.device)
        frame = (numbers[:, None] - self.delays.to(steps.device))[None]
        end = ends[:, None, None]
        read = steps.where(frame < end, self.pad_id).where(frame != end, self.eos_id)
        return read.where(frame >= 0, self.bos_id)


class DiaStream(CrossAttentionStream):
    """
    Decoding stream of a Dia.

    Args:
        layout ([`DelayedLayout`]): Says what the decoder reads.
        decoder (`DiaDecoder`): The decoder without its heads.
        condition (`dict`): Encoder states and mask of the `U` distinct prompts.
        index (`torch.Tensor`): Index of each row's prompt, int64, shape `(R,)`.
        steps (`int`): Number of decoder steps.
    """

    def __init__(
        self, layout: DelayedLayout, decoder: Any, condition: dict[str, torch.Tensor], index: torch.Tensor, steps: int
    ):
        super().__init__(decoder, condition, index, steps)
        self.layout, self.steps = layout, steps
        self.ends = torch.full((len(condition["encoder_hidden_states"]),), steps, device=index.device)
        self.number = 0

    def start(self) -> torch.Tensor:
        """Hidden states `(R, H)` that predict the first step."""
        shape = len(self.ends), 1, len(self.layout.delays)
        return self.begin(torch.full(shape, self.layout.bos_id, device=self.ends.device))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states `(R, H)` after one step of `K` ids per row, int64 `(R, K)`."""
        ended = (tokens[:, 0] >= self.layout.eos_id) & (self.ends == self.steps)
        self.ends = self.ends.where(~ended, self.number)
        read = self.layout.read(tokens[:, None], self.ends, self.number)
        self.number += 1
        return self.read(read)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the given rows, int64, in that order."""
        super().keep(rows)
        self.ends = self.ends[rows]
