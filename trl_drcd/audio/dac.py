"""Decoding of delayed codebooks of which the first ends the sequence: Dia's completions, by a DAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class DelayedCodec:
    """
    Decodes completions of delayed codebooks to audio with a neural codec of transformers (DAC).

    A completion is a flat list of `S * K` ids: step by step, the `K` codebooks of each step. Codebook `k` has the code
    of frame `t` at step `t + delays[k]`. The first id of codebook 0 that is not a code ends all codebooks, at that
    frame.

    Args:
        audio_tokenizer (`DacModel`): With `decode(audio_codes=)`, `config.sampling_rate` and `config.hop_length`.
        delays (`Sequence[int]`): Delay of each codebook, steps; the first is 0.
        codebook_size (`int`): Ids from here on are not codes.
        batch_size (`int`, *optional*, defaults to 8): Clips per batch.
    """

    def __init__(self, audio_tokenizer: Any, delays: Sequence[int], codebook_size: int, batch_size: int = 8):
        self.audio_tokenizer, self.delays = audio_tokenizer, list(delays)
        self.codebook_size, self.batch_size = codebook_size, batch_size

    def to_codes(self, token_ids: Sequence[int]) -> torch.Tensor:
        """
        Codes `(T, K)`, int64, of the whole frames of a completion or of its beginning; `T` may be 0.

        Raises:
            ValueError: If the number of ids is not a multiple of `K`, or a frame lacks a code.
        """
        books = len(self.delays)
        if len(token_ids) % books:
            raise ValueError(f"a completion must have S * {books} ids, got {len(token_ids)} ids")
        steps = torch.tensor(token_ids, dtype=torch.long).view(-1, books)
        coded = int((steps[:, 0] < self.codebook_size).long().cumprod(0).sum())
        frames = max(0, min(coded, len(steps) - max(self.delays)))
        codes = torch.stack([steps[late : late + frames, k] for k, late in enumerate(self.delays)], dim=-1)
        if (codes >= self.codebook_size).any():
            raise ValueError(
                f"the id {int(codes.max())} is at the position of a code, below {self.codebook_size}: the completion "
                "is not in the delay pattern"
            )
        return codes

    @torch.no_grad()
    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, int]]:
        """
        Decode to `(waveform, sampling_rate)`; waveforms are 1-D, float32, on the CPU.

        A completion without a whole frame gives one hop of silence.
        """
        config = self.audio_tokenizer.config
        all_codes = [self.to_codes(ids) for ids in token_ids]
        waveforms = [torch.zeros(int(config.hop_length)) for _ in all_codes]
        for frames in {len(codes) for codes in all_codes} - {0}:
            rows = [i for i, codes in enumerate(all_codes) if len(codes) == frames]
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                codes = torch.stack([all_codes[i].T for i in part]).to(self.audio_tokenizer.device)
                audio = self.audio_tokenizer.decode(audio_codes=codes).audio_values
                for i, waveform in zip(part, audio.reshape(len(part), -1).float().cpu(), strict=True):
                    waveforms[i] = waveform
        return [(waveform, int(config.sampling_rate)) for waveform in waveforms]
