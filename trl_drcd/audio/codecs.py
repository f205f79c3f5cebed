"""Codecs, from audio tokens to waveforms: a small closed-form spectral codec, and neural codecs of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from trl_drcd.files import open_to_readers
from trl_drcd.validation.saved_files import arguments_of, open_safetensors, read_json


class SpectralCodec(nn.Module):
    """
    Codec of log-mel spectrograms with residual vector quantisation, decoded with Griffin-Lim.

    Nothing is trained by gradient descent: codebooks come from residual k-means (see `fit_codebooks`), magnitudes from
    the pseudo-inverse of the mel matrix, phases from a few Griffin-Lim iterations. The initial phases are fixed, so
    decoding is deterministic.

    Shapes: `B` clips, `T` samples, `S = T // hop_length` frames, `K` codebooks of `C` entries, `M` mel bands. Frame
    `s` is centred on sample `s * hop_length`.

    Token ids are ordered frame by frame: code `c` of codebook `k` is `first_token_id + k * codebook_size + c`.

    Args:
        codebooks (`torch.Tensor`):
            Shape `(K, C, M)`, log mel magnitudes in nats.
        first_token_id (`int`):
            Token id of code 0 of codebook 0.
        sampling_rate, n_fft, hop_length (`int`):
            Sampling rate in Hz; window and hop of the spectrogram in samples.
        floor (`float`):
            Magnitude added before the logarithm, so that silence is finite.
        iterations (`int`):
            Griffin-Lim iterations of `decode_codes`.

    Raises:
        ValueError: If `codebooks` is not 3-D, or `sampling_rate`, `n_fft` or `hop_length` is below 1.
    """

    codebooks: torch.Tensor
    mel: torch.Tensor
    mel_inverse: torch.Tensor
    window: torch.Tensor

    def __init__(
        self,
        codebooks: torch.Tensor,
        first_token_id: int = 5,
        sampling_rate: int = 16000,
        n_fft: int = 2048,
        hop_length: int = 640,
        floor: float = 0.05,
        iterations: int = 8,
    ):
        super().__init__()
        if codebooks.dim() != 3:
            raise ValueError(f"`codebooks` must have shape (K, C, M), got {tuple(codebooks.shape)}")
        for name, value in {"sampling_rate": sampling_rate, "n_fft": n_fft, "hop_length": hop_length}.items():
            if value < 1:
                raise ValueError(f"the codec has `{name}={value}`; it must be a positive integer")
        if n_fft % 2:
            raise ValueError(f"the codec has `n_fft={n_fft}`; it must be even")
        if hop_length >= n_fft:
            raise ValueError(f"the codec has `hop_length={hop_length}`; it must be less than `n_fft`, {n_fft}")
        self.num_codebooks, self.codebook_size, self.num_mels = codebooks.shape
        self.first_token_id, self.sampling_rate, self.n_fft = first_token_id, sampling_rate, n_fft
        self.hop_length, self.floor, self.iterations = hop_length, floor, iterations
        mel = mel_matrix(n_fft, self.num_mels, sampling_rate)
        self.register_buffer("codebooks", codebooks.float())
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("mel_inverse", torch.linalg.pinv(mel), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.hop_length

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """
        Log-mel spectrogram `(B, S, M)`, nats, of a waveform `(T,)` or `(B, T)` of float samples in `[-1, 1]`.

        Raises:
            ValueError: If the waveform is shorter than a hop or half a window.
        """
        waveform = torch.atleast_2d(waveform).to(self.window)
        samples, least = waveform.shape[-1], max(self.hop_length, self.n_fft // 2 + 1)
        if samples < least:
            raise ValueError(f"`waveform` must have at least {least} samples, got {samples}")
        frames = samples // self.hop_length
        spectrum = torch.stft(waveform, self.n_fft, self.hop_length, window=self.window, return_complex=True)
        return (spectrum.abs()[..., :frames].transpose(1, 2) @ self.mel + self.floor).log()

    def quantise(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Codes `(B, S, K)`, int64, of log-mel frames `(B, S, M)`; each codebook quantises the last one's residual."""
        residual, codes = log_mel.reshape(-1, self.num_mels), []
        for codebook in self.codebooks:
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, -1).view(*log_mel.shape[:-1], self.num_codebooks)

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """Codes `(B, S, K)`, int64, of a waveform `(T,)` or `(B, T)`."""
        return self.quantise(self.log_mel(waveform))

    def decode_log_mel(self, codes: torch.Tensor) -> torch.Tensor:
        """The quantised log-mel spectrogram `(B, S, M)`, nats, of codes `(B, S, K)`."""
        return torch.stack([book[codes[..., k]] for k, book in enumerate(self.codebooks)]).sum(0)

    def decode_codes(self, codes: torch.Tensor, iterations: int | None = None) -> torch.Tensor:
        """
        Decode codes to waveforms.

        Args:
            codes (`torch.Tensor`): Shape `(B, S, K)`, integers in `[0, C)`.
            iterations (`int`, *optional*): Griffin-Lim iterations; the codec's `iterations` if `None`.

        Returns:
            `torch.Tensor`: Shape `(B, S * hop_length)`, float32, in `[-1, 1]`.

        Raises:
            ValueError: If the shape is not `(B, S, K)`, or a code is out of range.
        """
        if codes.dim() != 3 or codes.shape[-1] != self.num_codebooks or codes.shape[1] < 1:
            raise ValueError(f"`codes` must have shape (B, S >= 1, {self.num_codebooks}), got {tuple(codes.shape)}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"`codes` must be in 0..{self.codebook_size - 1}, got {codes.min()}..{codes.max()}")
        mel = (self.decode_log_mel(codes.to(self.window.device).long()).exp() - self.floor).clamp_min(0)
        magnitude = (mel @ self.mel_inverse).clamp_min(0)
        # The frame after the last one is not coded; repeat the last, or the end would fade out over half a window.
        magnitude = torch.cat([magnitude, magnitude[:, -1:]], 1)
        # On a CPU, four clips at a time: larger temporaries are mapped again in each iteration, which doubles the
        # time.
        size = 4 if magnitude.device.type == "cpu" else max(1, len(magnitude))
        length, rounds = codes.shape[1] * self.hop_length, self.iterations if iterations is None else iterations
        waveforms = [self._griffin_lim(part, length, rounds) for part in magnitude.split(size)]
        return torch.cat(waveforms).clamp(-1, 1)

    def _griffin_lim(self, magnitude: torch.Tensor, length: int, iterations: int) -> torch.Tensor:
        """Fast Griffin-Lim (Perraudin et al., 2013) from fixed phases, of magnitudes `(B, S + 1, bins)`."""
        # Initial phases advance at each bin's centre frequency; random phases would need twice the iterations.
        frames, bins = magnitude.shape[1:]
        start = torch.rand(bins, generator=torch.Generator().manual_seed(0))
        turns = start + torch.outer(torch.arange(frames), torch.arange(bins)) * (self.hop_length / self.n_fft)
        angles = torch.polar(torch.ones_like(turns), 2 * torch.pi * (turns % 1)).to(magnitude.device)
        envelope = overlap_add(self.window.square().expand(1, frames, -1), self.hop_length)
        trim = slice(self.n_fft // 2, self.n_fft // 2 + length)

        def istft(spectrum: torch.Tensor) -> torch.Tensor:
            """Faster than `torch.istft`, which makes the envelope again each time and adds the frames by index."""
            windowed = torch.fft.irfft(spectrum, self.n_fft) * self.window
            return (overlap_add(windowed, self.hop_length) / envelope.clamp_min(1e-11))[:, trim]

        spectrum, previous = magnitude * angles, torch.zeros_like(magnitude, dtype=angles.dtype)
        for _ in range(iterations):
            rebuilt = torch.stft(
                istft(spectrum), self.n_fft, self.hop_length,
                window=self.window, pad_mode="constant", return_complex=True,
            ).transpose(1, 2)  # fmt: skip
            phases = rebuilt - previous * (0.99 / 1.99)
            spectrum, previous = phases * (magnitude / phases.abs().clamp_min(1e-8)), rebuilt
        return istft(spectrum)

    def to_token_ids(self, codes: torch.Tensor) -> list[int]:
        """Token ids, frame by frame, of the codes `(S, K)` of one clip."""
        offsets = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size + self.first_token_id
        return (codes.long() + offsets).flatten().tolist()

    def to_codes(self, token_ids: Sequence[int]) -> torch.Tensor:
        """
        Codes `(S, K)`, int64, of a sequence of token ids: the inverse of `to_token_ids`, tolerant of invalid tokens.

        Tokens are read from left to right. A token that does not belong to the next expected codebook is skipped. An
        incomplete last frame is dropped, so a sequence without a complete frame gives `(0, K)`.
        """
        codes: list[int] = []
        for token in token_ids:
            codebook, code = divmod(int(token) - self.first_token_id, self.codebook_size)
            if codebook == len(codes) % self.num_codebooks:
                codes.append(code)
        frames = len(codes) // self.num_codebooks
        return torch.tensor(codes[: frames * self.num_codebooks], dtype=torch.long).view(frames, self.num_codebooks)

    @torch.no_grad()
    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, int]]:
        """
        Decode sequences of token ids to `(waveform, sampling_rate)`; waveforms are 1-D, float32, on the CPU.

        Sequences with the same number of frames are decoded in one batch. Invalid tokens are skipped as in `to_codes`.
        A sequence without a complete frame gives one hop of silence.
        """
        return self._decode([self.to_codes(tokens) for tokens in token_ids], self.iterations)

    @torch.no_grad()
    def draft(
        self, token_ids: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[list[tuple[torch.Tensor, int]]]:
        """
        Decode prefixes of sequences of token ids, in one pass and without Griffin-Lim iterations.

        A prefix is cut half a window before its next frame, so that it does not depend on later tokens. A prefix too
        short for that gives one hop of silence.

        Args:
            token_ids (`Sequence`): As in `decode`.
            lengths (`Sequence[int]`): Lengths of the prefixes, in token ids.

        Returns:
            `list`: For each length, `(waveform, sampling_rate)` of each sequence, as from `decode`.
        """
        whole = self._decode([self.to_codes(tokens) for tokens in token_ids], iterations=0)
        silence = torch.zeros(self.hop_length)

        def beginning(waveform: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, int]:
            end = len(self.to_codes(tokens)) * self.hop_length - self.n_fft // 2
            return (waveform[:end] if end > 0 else silence), self.sampling_rate

        return [
            [beginning(waveform, tokens[:length]) for (waveform, _), tokens in zip(whole, token_ids, strict=True)]
            for length in lengths
        ]

    def _decode(self, all_codes: list[torch.Tensor], iterations: int) -> list[tuple[torch.Tensor, int]]:
        """`(waveform, sampling_rate)` of the codes `(S, K)` of each sequence."""
        waveforms = [torch.zeros(self.hop_length) for _ in all_codes]
        for frames in {len(codes) for codes in all_codes} - {0}:
            rows = [i for i, codes in enumerate(all_codes) if len(codes) == frames]
            decoded = self.decode_codes(torch.stack([all_codes[i] for i in rows]), iterations).cpu()
            for i, waveform in zip(rows, decoded, strict=True):
                waveforms[i] = waveform
        return [(waveform, self.sampling_rate) for waveform in waveforms]

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json` and `codec.safetensors`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = ("first_token_id", "sampling_rate", "n_fft", "hop_length", "floor", "iterations")
        config: dict[str, Any] = {"codec_type": "spectral"} | {name: getattr(self, name) for name in names}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({"codebooks": self.codebooks.contiguous()}, directory / "codec.safetensors")
        open_to_readers(directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> SpectralCodec:
        """
        Read a folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is broken, or holds another kind of codec.
        """
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give the folder of a codec")
        config = read_json(folder / "config.json")
        if config.pop("codec_type", None) != "spectral":
            raise ValueError(
                f"{directory} does not hold a spectral codec: its config.json lacks `codec_type: spectral`; give the "
                "folder of a codec"
            )
        with open_safetensors(folder / "codec.safetensors") as tensors:
            if "codebooks" not in tensors.keys():  # noqa: SIM118
                raise ValueError(f"{folder / 'codec.safetensors'} has no `codebooks`; copy or save it again")
            codebooks = tensors.get_tensor("codebooks").float()
        return cls(**arguments_of(cls, {"codebooks": codebooks} | config, folder / "config.json"))


def overlap_add(frames: torch.Tensor, hop_length: int) -> torch.Tensor:
    """
    The sum of frames `(B, S, N)`, each `hop_length` samples after the one before.

    Returns:
        `torch.Tensor`: Shape `(B, (S - 1) * hop_length + N)`.
    """
    batch, count, size = frames.shape
    total = frames.new_zeros(batch, count + (size - 1) // hop_length, hop_length)
    for hop, part in enumerate(frames.split(hop_length, -1)):
        total[:, hop : hop + count, : part.shape[-1]] += part
    return total.flatten(1)[:, : (count - 1) * hop_length + size]


def delays_of(num_codebooks: int, channels: int = 1) -> list[int]:
    """Delay of each codebook, steps: `k`; for stereo, whose codebooks alternate between channels, `k // 2`."""
    return [k // channels for k in range(num_codebooks)]


def is_coded(steps: int, num_codebooks: int, channels: int = 1) -> torch.Tensor:
    """Positions of codes in the delay pattern, bool `(S, K)`: each codebook has as many codes, from its delay on."""
    delays = delays_of(num_codebooks, channels)
    frame = torch.arange(steps)[:, None] - torch.tensor(delays)
    return (frame >= 0) & (frame < steps - delays[-1])


def delay(codes: torch.Tensor, mask_id: int, channels: int = 1) -> torch.Tensor:
    """Apply the delay pattern: codes `(B, T, K)` to `(B, S, K)`, with `S = T` plus the largest delay."""
    batch, frames, books = codes.shape
    delays = delays_of(books, channels)
    delayed = codes.new_full((batch, frames + delays[-1], books), mask_id)
    for k, late in enumerate(delays):
        delayed[:, late : late + frames, k] = codes[..., k]
    return delayed


def undelay(delayed: torch.Tensor, channels: int = 1) -> torch.Tensor:
    """Undo the delay pattern: `(B, S, K)` to codes `(B, T, K)`."""
    delays = delays_of(delayed.shape[2], channels)
    frames = delayed.shape[1] - delays[-1]
    return torch.stack([delayed[:, late : late + frames, k] for k, late in enumerate(delays)], dim=-1)


class CodebookCodec:
    """
    Decodes MusicGen's completions to audio with a neural codec of transformers (EnCodec).

    Args:
        audio_encoder (`PreTrainedModel`): A mono codec with `decode(audio_codes, audio_scales)` and
            `config.sampling_rate`; it decodes one channel at a time.
        num_codebooks (`int`): `K`.
        mask_id (`int`): The id at positions of the delay pattern without a code.
        batch_size (`int`, *optional*, defaults to 8): Clips per batch.
        channels (`int`, *optional*, defaults to 1): 2 for stereo; codebooks 0, 2, ... are then the left channel's.
    """

    def __init__(self, audio_encoder: Any, num_codebooks: int, mask_id: int, batch_size: int = 8, channels: int = 1):
        self.audio_encoder, self.num_codebooks = audio_encoder, num_codebooks
        self.mask_id, self.batch_size, self.channels = mask_id, batch_size, channels

    def to_codes(self, token_ids: Sequence[int]) -> torch.Tensor:
        """
        Codes `(T, K)`, int64, of one completion of `S * K` ids in the delay pattern.

        Raises:
            ValueError: If the number of ids is not a multiple of `K`, `S` is below `K`, or the mask id is at the
                position of a code.
        """
        steps, least = len(token_ids) // self.num_codebooks, self.num_codebooks // self.channels
        if len(token_ids) % self.num_codebooks or steps < least:
            raise ValueError(
                f"a completion must have S * {self.num_codebooks} ids, with S at least {least}, got "
                f"{len(token_ids)} ids"
            )
        codes = undelay(torch.tensor(token_ids).view(1, steps, self.num_codebooks), self.channels)[0]
        if (codes == self.mask_id).any():
            raise ValueError(
                f"the mask id {self.mask_id} is at the position of a code: the completion is not in the delay pattern"
            )
        return codes

    @torch.no_grad()
    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, int]]:
        """Decode to `(waveform, sampling_rate)`; waveforms are float32 on the CPU, `(T,)`, or `(2, T)` for stereo."""
        all_codes = [self.to_codes(ids) for ids in token_ids]
        waveforms: list[torch.Tensor] = [torch.empty(0)] * len(all_codes)
        device, rate = self.audio_encoder.device, int(self.audio_encoder.config.sampling_rate)
        for frames in {len(codes) for codes in all_codes}:
            rows = [i for i, codes in enumerate(all_codes) if len(codes) == frames]
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                codes = torch.stack([all_codes[i] for i in part]).transpose(1, 2).to(device)
                sides = [codes[:, side :: self.channels] for side in range(self.channels)]
                audio = torch.cat([self.audio_encoder.decode(c[None], [None]).audio_values[:, :1] for c in sides], 1)
                for i, waveform in zip(part, audio.float().cpu(), strict=True):
                    waveforms[i] = waveform if self.channels > 1 else waveform[0]
        return [(waveform, rate) for waveform in waveforms]


def mel_matrix(n_fft: int, num_mels: int, sampling_rate: int) -> torch.Tensor:
    """Triangular HTK mel filters over `0 .. sampling_rate / 2` Hz, shape `(n_fft // 2 + 1, num_mels)`."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(n_fft // 2 + 1, num_mels, 0.0, sampling_rate / 2, sampling_rate, mel_scale="htk")
    return torch.from_numpy(filters).float()


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index `(N,)` of the nearest entry (Euclidean) of a codebook `(C, M)` for vectors `(N, M)`."""
    norms = codebook.square().sum(1)
    return torch.cat([(norms - 2 * part @ codebook.T).argmin(1) for part in vectors.split(65536)])


def fit_codebooks(
    frames: torch.Tensor, num_codebooks: int, codebook_size: int, iterations: int = 30, seed: int = 0
) -> torch.Tensor:
    """
    Fit codebooks by residual k-means (Lloyd's algorithm), one after the other.

    Args:
        frames (`torch.Tensor`): Shape `(N, M)`, log-mel frames, at least `codebook_size`.
        num_codebooks, codebook_size (`int`): `K` and `C`.
        iterations (`int`): Lloyd iterations per codebook.
        seed (`int`): Random seed of the initial centroids and of replacements of empty clusters.

    Returns:
        `torch.Tensor`: Shape `(K, C, M)`.

    Raises:
        ValueError: If there are fewer than `codebook_size` frames.
    """
    if len(frames) < codebook_size:
        raise ValueError(f"`frames` must have at least `codebook_size={codebook_size}` rows, got {len(frames)}")
    generator = torch.Generator().manual_seed(seed)
    residual, codebooks = frames, []
    for _ in range(num_codebooks):
        codebook = residual[torch.randperm(len(residual), generator=generator)[:codebook_size]].clone()
        for _ in range(iterations):
            codes = nearest(residual, codebook)
            counts = torch.bincount(codes, minlength=codebook_size)
            sums = torch.zeros_like(codebook).index_add_(0, codes, residual)
            spare = residual[torch.randint(len(residual), (codebook_size,), generator=generator)]
            codebook = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], spare)
        codebooks.append(codebook)
        residual = residual - codebook[nearest(residual, codebook)]
    return torch.stack(codebooks)
