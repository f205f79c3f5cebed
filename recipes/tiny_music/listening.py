"""What the embedder's and the judge's training share: their clips, kept apart, as banks of log-mel windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from render import OUTPUT, SAMPLES, SAMPLING_RATE
from scores import HERE
from tqdm import tqdm

from trl_drcd.codecs import SpectralCodec
from trl_drcd.embedders.audio_front_end import LogMel, audio_windows

CODEC = HERE / "models" / "codec"


def half_of(row: dict) -> int:
    """0 (the embedder's) or 1 (the judge's): which of the two halves of the tunes a metadata row belongs to."""
    return hashlib.sha256(str(row["family"]).encode()).digest()[0] % 2


def as_audio(waveforms: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """What embedders and judges are called with."""
    return [(waveform, SAMPLING_RATE) for waveform in waveforms]


class Clips:
    """Clips of a split: `rows` (N,) of metadata; `index` (N,) into `audio` (all, T) int16 and `codes` (all, S, K)."""

    def __init__(
        self,
        split: str,
        half: int | None = None,
        recordings: int | None = None,
        chunks: int = 2,
        folder: Path = OUTPUT,
    ):
        with open(folder / split / "metadata.jsonl") as file:
            rows = [json.loads(line) for line in file]
        keep = [i for i, row in enumerate(rows) if row["chunk"] < chunks and half in (None, half_of(row))]
        # In their random order; the chunks of a recording are neighbours.
        self.index = np.array(keep if recordings is None else keep[: chunks * recordings])
        self.rows = [rows[i] for i in self.index]
        self.audio = np.load(folder / split / "audio.npy", mmap_mode="r")
        self.codes = np.load(folder / split / "codes.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def waveforms(self, codec: SpectralCodec | None, batch: int = 64) -> Iterator[torch.Tensor]:
        """Batches of waveforms (b, T) in [-1, 1]: the originals, or what the codec makes of their codes."""
        for start in tqdm(range(0, len(self), batch), desc="round trips" if codec else "originals", unit="batch"):
            index = self.index[start : start + batch]
            if codec is None:
                yield torch.from_numpy(self.audio[index].astype(np.float32) / 32768)
            else:
                codes = torch.from_numpy(self.codes[index].astype(np.int64))
                yield torch.cat([codec.decode_codes(part) for part in codes.split(8)])  # faster than all at once


def resampled(waveforms: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Waveforms (b, T) played `rates` (b,) times as fast, by linear interpolation; zeros after their end."""
    length = waveforms.shape[-1]
    position = torch.arange(length) * rates[:, None]
    left = position.long().clamp(max=length - 2)
    value = torch.lerp(waveforms.gather(1, left), waveforms.gather(1, left + 1), (position - left).clamp(max=1.0))
    return value.masked_fill(position > length - 1, 0.0)


def stretched(frames: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Log-mel frames (b, F, M) played `rates` (b,) times as fast at the same pitch; the last one is held."""
    last = frames.shape[1] - 1
    position = (torch.arange(last + 1) * rates[:, None]).clamp(max=last)
    left = position.long().clamp(max=last - 1)
    index = left[..., None].expand(frames.shape)
    return torch.lerp(frames.gather(1, index), frames.gather(1, index + 1), (position - left)[..., None])


def augmented(
    waveforms: torch.Tensor, log_mel: LogMel, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-mel windows of a batch with noise (15-40 dB), pitch (1 semitone) and tempo (10 %) changed at random.

    Pitch by resampling the waveform, which changes the tempo too; tempo by resampling the frames.

    Returns:
        `tuple` of `torch.Tensor`: frames `(b, F, M)`; the share of each clip that holds sound, `(b,)`, at most 1.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(waveforms), generator=generator)

    pitch, tempo = 2 ** uniform(-1 / 12, 1 / 12), uniform(0.9, 1.1)
    level = waveforms.square().mean(1).sqrt() * 10 ** (-uniform(15, 40) / 20)
    noise = level[:, None] * torch.randn(waveforms.shape, generator=generator)
    changed = resampled(waveforms + noise, pitch)
    windows = audio_windows(as_audio(changed), SAMPLING_RATE, SAMPLES)[0]
    # The waveform already runs `pitch` times as fast.
    return stretched(log_mel(windows), tempo / pitch), (1 / torch.maximum(tempo, pitch)).clamp(max=1.0)


def banks(clips: Clips, log_mel: LogMel, codec: SpectralCodec | None, seeds: list[int | None]) -> list[tuple]:
    """
    All clips as log-mel windows, once as they are where the seed is `None`, and once augmented for each other seed.

    Returns:
        `list` of `tuple` of `torch.Tensor`: for each seed, the frames `(N, F, M)`, bfloat16, and the share of each
        clip that holds sound, `(N,)`.
    """
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in seeds]
    for waveforms in clips.waveforms(codec):
        for part, generator in zip(parts, generators, strict=True):
            if generator is None:
                windows = audio_windows(as_audio(waveforms), SAMPLING_RATE, SAMPLES)[0]
                frames, shares = log_mel(windows), torch.ones(len(windows))
            else:
                frames, shares = augmented(waveforms, log_mel, generator)
            part.append((frames.bfloat16(), shares))
    return [(torch.cat([frames for frames, _ in part]), torch.cat([shares for _, shares in part])) for part in parts]


def log_mel_statistics(clips: Clips, log_mel: LogMel) -> dict[str, float]:
    """`mel_mean` and `mel_std`, in nats, over the first clips; `log_mel` must not standardise yet."""
    frames = log_mel(audio_windows(as_audio(next(clips.waveforms(None, 512))), SAMPLING_RATE, SAMPLES)[0])
    return {"mel_mean": float(frames.mean()), "mel_std": float(frames.std())}
