"""A second embedding of music, without training: descriptors of timbre, harmony and rhythm."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trl_drcd.audio.front_end import LogMel, SavedModule, clean_waveform
from trl_drcd.compat.extras import require

LAGS = (0.25, 0.5, 1.0)  # seconds between the notes of an interval
BLOCKS = ("timbre", "harmony", "rhythm")


class MusicDescriptors(SavedModule):
    """
    Embeds audio with hand-crafted descriptors, as a check on trained embedders.

    Three blocks, each standardised with means and standard deviations of real music and given equal weight:

    - timbre: mean and standard deviation over time of mel-frequency cepstral coefficients, without the first;
    - harmony: the mean chroma (strength of pitch classes), and the strength of each interval between notes 0.25, 0.5
      and 1 s apart, independent of the key;
    - rhythm: autocorrelation of the onset strength at lags from 0.1 to 2 s.

    Embeddings do not depend on loudness. Clips of any length are read whole; those below 2.5 s are padded with
    silence.

    Args:
        sampling_rate (`int`): Sampling rate of the analysis, Hz; audio of other rates is resampled.
        num_cepstra (`int`): Number of cepstral coefficients.
        num_rhythm_lags (`int`): Number of lags of the autocorrelation, logarithmically spaced.

    Raises:
        ImportError: If torchaudio is not installed (extra `audio`).
    """

    def __init__(self, sampling_rate: int = 16000, num_cepstra: int = 20, num_rhythm_lags: int = 24) -> None:
        super().__init__()
        self.sampling_rate, self.hop_length = sampling_rate, sampling_rate // 50
        self.log_mel = LogMel(sampling_rate, 2048, self.hop_length, 64, 0.0, 1.0)
        functional = require("torchaudio.functional", "audio")
        self.cosines: torch.Tensor
        self.pitch_classes: torch.Tensor
        self.register_buffer("cosines", functional.create_dct(num_cepstra + 1, 64, "ortho")[:, 1:], persistent=False)
        self.audible, pitch_classes = _pitch_classes(sampling_rate, 4096)
        self.register_buffer("pitch_classes", pitch_classes, persistent=False)
        ratios = torch.logspace(math.log10(0.1), math.log10(2.0), num_rhythm_lags)
        self.rhythm_lags = (ratios * sampling_rate / self.hop_length).round().long().tolist()
        self.block_sizes = [2 * num_cepstra, 12 * (1 + len(LAGS)), num_rhythm_lags]
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(sum(self.block_sizes)))
        self.register_buffer("std", torch.ones(sum(self.block_sizes)))

    def fit(self, audio: Sequence[tuple[Any, int]]) -> "MusicDescriptors":
        """
        Set the means and standard deviations of the descriptors from clips of real music.

        Raises:
            ValueError: If there are fewer than 2 clips; otherwise as for [`forward`].
        """
        if len(audio) < 2:
            raise ValueError(f"`audio` must have at least 2 clips for standard deviations, got {len(audio)}")
        raw = self.descriptors(audio)
        self.mean, self.std = raw.mean(0), raw.std(0).clamp(min=1e-4)
        return self

    @torch.no_grad()
    def descriptors(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """The descriptors before standardisation, shape `(len(audio), D)`; raises as [`forward`] does."""
        rows = [torch.cat(self._describe(wave, rate, i, BLOCKS)) for i, (wave, rate) in enumerate(audio)]
        return torch.stack(rows) if rows else torch.zeros(0, len(self.mean))

    def forward(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """
        Embed a list of clips.

        Args:
            audio (`list` of `(waveform, sampling_rate)`): Waveforms 1-D, floating point, of any length; rates in Hz.

        Returns:
            `torch.Tensor`: Shape `(len(audio), D)`, float32, on the CPU, rows of unit norm.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If a waveform is not 1-D or not finite, or a rate is not a positive integer.
        """
        blocks = [block / math.sqrt(block.shape[-1]) for block in self._standard(audio, BLOCKS)]
        return nn.functional.normalize(torch.cat(blocks, -1), dim=-1)

    def blocks(self, audio: Sequence[tuple[Any, int]], names: Sequence[str] = BLOCKS) -> dict[str, torch.Tensor]:
        """
        Each block of descriptors as an embedding of its own; raises as [`forward`] does.

        Args:
            names (`list[str]`): Of "timbre", "harmony" and "rhythm"; what is not named takes no time.

        Returns:
            `dict[str, torch.Tensor]`: By name, each `(len(audio), D)` with its own `D`, float32, on the CPU, rows of
            unit norm.
        """
        normalised = (nn.functional.normalize(block, dim=-1) for block in self._standard(audio, names))
        return dict(zip(names, normalised, strict=True))

    def _standard(self, audio: Sequence[tuple[Any, int]], names: Sequence[str]) -> list[torch.Tensor]:
        """The standardised descriptors, a tensor `(len(audio), D)` for each block."""
        means, stds = (dict(zip(BLOCKS, t.cpu().split(self.block_sizes), strict=True)) for t in (self.mean, self.std))
        rows = [self._describe(wave, rate, i, names) for i, (wave, rate) in enumerate(audio)]
        raw = [torch.stack(block) for block in zip(*rows, strict=True)] or [means[name][:0, None] for name in names]
        return [(block - means[name]) / stds[name] for name, block in zip(names, raw, strict=True)]

    def _describe(self, wave: Any, rate: int, index: int, names: Sequence[str]) -> list[torch.Tensor]:
        """The named blocks of the clip at `index`, before standardisation."""
        waveform = clean_waveform(wave, rate, index, self.sampling_rate)
        shortest = int(2.5 * self.sampling_rate)
        waveform = nn.functional.pad(waveform, (0, max(0, shortest - len(waveform)))).to(self.cosines.device)
        waveform = nn.functional.pad(waveform, (0, -len(waveform) % self.hop_length))
        found = {}
        if "harmony" in names:
            found["harmony"] = self._harmony(waveform)
        if "timbre" in names or "rhythm" in names:
            mel = self.log_mel(waveform[None])[0]  # (F, 64)
            found |= {"timbre": self._timbre(mel), "rhythm": self._rhythm(mel)}
        return [found[name].float().cpu() for name in names]

    def _timbre(self, mel: torch.Tensor) -> torch.Tensor:
        cepstra = mel @ self.cosines
        return torch.cat([cepstra.mean(0), cepstra.std(0)])

    def _harmony(self, waveform: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(4096, device=waveform.device)
        spectrum = torch.stft(waveform, 4096, self.hop_length, window=window, pad_mode="constant", return_complex=True)
        chroma = nn.functional.normalize(spectrum[self.audible].abs().T @ self.pitch_classes, dim=-1)  # (F, 12)
        frames = [round(lag * self.sampling_rate / self.hop_length) for lag in LAGS]
        return torch.cat([chroma.mean(0), *(intervals(chroma, lag) for lag in frames)])

    def _rhythm(self, mel: torch.Tensor) -> torch.Tensor:
        onsets = (mel[1:] - mel[:-1]).clamp(min=0).mean(1)
        onsets = onsets - onsets.mean()
        power = onsets.square().sum().clamp(min=1e-8)
        return torch.stack([(onsets[lag:] * onsets[:-lag]).sum() / power for lag in self.rhythm_lags])


def intervals(chroma: torch.Tensor, lag: int) -> torch.Tensor:
    """
    Strength of each interval of `i` semitones between chroma `lag` frames apart; invariant to transposition.

    `mean over t of sum_p c[t, p] c[t + lag, p + i]`, with pitch classes modulo 12.

    Args:
        chroma (`torch.Tensor`): Shape `(F, 12)`.
        lag (`int`): Number of frames, below `F`.

    Returns:
        `torch.Tensor`: Shape `(12,)`, no unit.
    """
    now, later = chroma[:-lag], chroma[lag:]
    return torch.stack([(now * later.roll(-i, dims=1)).sum(1).mean() for i in range(12)])


def _pitch_classes(sampling_rate: int, n_fft: int) -> tuple[slice, torch.Tensor]:
    """The bins from 65 Hz to 2 kHz, and the assignment `(bins, 12)` of each to its nearest pitch class."""
    frequencies = torch.arange(n_fft // 2 + 1) * sampling_rate / n_fft
    audible = slice(int((frequencies < 65).sum()), int((frequencies <= 2000).sum()))
    pitch = 69 + 12 * torch.log2(frequencies[audible] / 440)
    return audible, nn.functional.one_hot(pitch.round().long() % 12, 12).float()
