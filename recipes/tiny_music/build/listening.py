"""What the training of the embedder and of the judges shares: their clips, kept apart, as log-mel windows."""

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

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio.front_end import LogMel, audio_windows

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


def bank(clips: Clips, log_mel: LogMel, codec: SpectralCodec | None) -> torch.Tensor:
    """All clips as log-mel windows `(N, F, M)`, bfloat16: the originals, or what the codec makes of their codes."""
    return torch.cat([log_mel_of(waveforms, log_mel) for waveforms in clips.waveforms(codec)])


def log_mel_of(waveforms: torch.Tensor, log_mel: LogMel) -> torch.Tensor:
    """Log-mel windows `(b, F, M)`, bfloat16, of waveforms `(b, SAMPLES)`."""
    windows = audio_windows(as_audio(waveforms), SAMPLING_RATE, SAMPLES)[0]
    return torch.cat([log_mel(part) for part in windows.split(16)]).bfloat16()


def log_mel_statistics(clips: Clips, log_mel: LogMel) -> dict[str, float]:
    """`mel_mean` and `mel_std`, in nats, over the first clips; `log_mel` must not standardise yet."""
    frames = log_mel(audio_windows(as_audio(next(clips.waveforms(None, 512))), SAMPLING_RATE, SAMPLES)[0])
    return {"mel_mean": float(frames.mean()), "mel_std": float(frames.std())}
