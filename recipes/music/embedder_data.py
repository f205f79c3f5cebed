"""What the embedding model hears in training: recordings of a collection of audio, in chunks, changed at random."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.front_end import LogMel, clean_waveform, resampled_waveform
from trl_drcd.compat.extras import require
from trl_drcd.validation.model_folders import is_hub_name

AUDIO_FILES = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"}


class Recordings(Protocol):
    """A collection of recordings."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Samples `(T,)`, or `(T, channels)`, and the sampling rate in Hz."""


class AudioFiles:
    """Audio files, read with soundfile when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        soundfile = require("soundfile", "audio")
        try:
            return soundfile.read(self.files[index], dtype="float32")
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"`dataset`: {self.files[index]} cannot be read ({error}); remove or convert it"
            ) from error


class HubAudio:
    """A column of audio of a data set, decoded with soundfile."""

    def __init__(self, name: str, split: str, column: str) -> None:
        from datasets import Audio, load_dataset

        dataset = load_dataset(name, split=split)
        if column not in dataset.column_names:
            raise ValueError(f"`dataset={name}` has no column `{column}`; it has {dataset.column_names}")
        self.rows = dataset.cast_column(column, Audio(decode=False))[column]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row = self.rows[index]
        source = io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"]
        return require("soundfile", "audio").read(source, dtype="float32")


class ArrayRecordings:
    """The rows of an array `(N, samples)`; whole numbers are 16-bit samples."""

    def __init__(self, array: np.ndarray, sampling_rate: int) -> None:
        self.array, self.sampling_rate = array, sampling_rate

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row = self.array[index]
        return row / np.float32(32768) if row.dtype.kind == "i" else row.astype(np.float32), self.sampling_rate


def load_array(path: Path) -> np.ndarray:
    """
    Recordings `(N, samples)`, on the disk.

    Raises:
        ValueError: If the file is torn, holds something else, or a pickle.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"`dataset={path}` is torn, or a pickle, which could run code ({error}); copy or save it again as numbers"
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "if":
        raise ValueError(
            f"`dataset={path}` has shape {array.shape} of {array.dtype}; it must hold numbers (N, samples)"
        )
    return array


def open_recordings(dataset: str, split: str, column: str, sampling_rate: int) -> Recordings:
    """
    The recordings of a folder of audio files, of a `.npy` file at `sampling_rate`, or of a hub data set.

    Raises:
        FileNotFoundError: If a path is given and there is nothing.
        ValueError: If a hub data set has no such column, or an array is none of recordings.
    """
    path = Path(dataset)
    if path.suffix == ".npy" and path.is_file():
        return ArrayRecordings(load_array(path), sampling_rate)
    if path.is_dir():
        return AudioFiles(sorted(f for f in path.rglob("*") if f.suffix.lower() in AUDIO_FILES))
    if path.suffix == ".npy" or not is_hub_name(dataset):
        raise FileNotFoundError(f"`dataset={dataset}` does not exist; give a folder, a .npy file, or a hub name")
    return HubAudio(dataset, split, column)


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
    waveforms: torch.Tensor, log_mel: LogMel, sampling_rate: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-mel windows of waveforms (b, T); noise (15-40 dB), pitch (1 semitone) and tempo (10 %) are changed at random in
    half of them.

    Pitch by resampling the waveform, which changes the tempo too; tempo by resampling the frames.

    Returns:
        `tuple` of `torch.Tensor`: frames `(b, F, M)`; the share of each window that holds sound, `(b,)`, at most 1.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(waveforms), generator=generator)

    change = (uniform(0, 1) < 0.5).float()
    pitch, tempo = 2 ** (change * uniform(-1 / 12, 1 / 12)), 1 + change * uniform(-0.1, 0.1)
    level = change * waveforms.square().mean(1).sqrt() * 10 ** (-uniform(15, 40) / 20)
    noise = level[:, None] * torch.randn(waveforms.shape, generator=generator)
    changed = resampled(waveforms + noise, pitch)
    windows = torch.stack([clean_waveform(wave, sampling_rate, i, sampling_rate) for i, wave in enumerate(changed)])
    # The waveform already runs `pitch` times as fast.
    return stretched(log_mel(windows), tempo / pitch), (1 / torch.maximum(tempo, pitch)).clamp(max=1.0)


def two_chunks(waveform: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Two random chunks `(2, length)` of a recording `(T,)` that do not overlap; `T` at least `2 * length`."""
    slack = len(waveform) - 2 * length
    before, after = sorted(torch.randint(slack + 1, (2,), generator=generator).tolist())
    return torch.stack([waveform[before : before + length], waveform[after + length : after + 2 * length]])


class Heard(Dataset):
    """
    What E hears of recordings: item `(index, version)` is two augmented chunks, the same at every call.

    Args:
        recordings ([`Recordings`]): At least two windows long each; see [`long_enough`].
        embedder ([`MusicEmbedder`]): Whose window and spectrogram are used.
        codec ([`SpectralCodec`], *optional*): Each chunk goes through it with probability 1/2: an original and what a
            codec makes of another chunk of it are positives too.
        seed (`int`): Of chunks and augmentation.
    """

    def __init__(self, recordings: Recordings, embedder: MusicEmbedder, codec: Any, seed: int) -> None:
        self.recordings, self.codec, self.seed = recordings, codec, seed
        self.log_mel, self.window, self.rate = embedder.log_mel, embedder.window, embedder.sampling_rate

    def waveform(self, index: int) -> torch.Tensor:
        """A recording, mono, at the model's rate and at its own loudness, on which a codec may depend."""
        samples, rate = self.recordings[index]
        mono = samples.mean(1) if samples.ndim == 2 else samples
        return resampled_waveform(torch.from_numpy(np.ascontiguousarray(mono)), rate, index, self.rate)

    @torch.no_grad()
    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, version = item
        generator = torch.Generator().manual_seed(hash((self.seed, index, version)) % 2**63)
        chunks = two_chunks(self.waveform(index), self.window, generator)
        through = torch.rand(2, generator=generator) < 0.5
        if self.codec is not None and through.any():
            coded = self.codec.decode_codes(self.codec.encode(chunks[through]))[:, : self.window]
            chunks[through] = torch.nn.functional.pad(coded, (0, self.window - coded.shape[1]))
        frames, shares = augmented(chunks, self.log_mel, self.rate, generator)
        return frames.bfloat16(), shares


class Kept(Dataset):
    """The first `versions` of every item of [`Heard`], computed once; in a file, so that a second run finds them."""

    def __init__(self, heard: Heard, indices: Sequence[int], versions: int, file: Path, show: bool) -> None:
        self.place = {index: row for row, index in enumerate(indices)}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shape = (len(indices), versions, *heard[indices[0], 0][0].shape)
            bank = np.lib.format.open_memmap(file.with_suffix(".tmp"), "w+", np.int16, shape)  # the bits of bfloat16
            shares = np.zeros(shape[:3], np.float32)
            for row, index in enumerate(tqdm(indices, desc="augment", unit="recording", disable=not show)):
                for version in range(versions):
                    frames, share = heard[index, version]
                    bank[row, version], shares[row, version] = frames.view(torch.int16).numpy(), share.numpy()
            bank.flush()
            np.save(file.with_suffix(".shares.npy"), shares)
            os.replace(file.with_suffix(".tmp"), file)
        self.bank = np.load(file, mmap_mode="r")
        self.shares = np.load(file.with_suffix(".shares.npy"))

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        row, version = self.place[item[0]], item[1]
        frames = torch.from_numpy(np.array(self.bank[row, version])).view(torch.bfloat16)
        return frames, torch.from_numpy(self.shares[row, version])


def long_enough(heard: Heard, show: bool) -> list[int]:
    """The recordings from which two chunks can be taken; says how many cannot."""
    count = len(heard.recordings)
    kept = [i for i in tqdm(range(count), desc="read", disable=not show) if len(heard.waveform(i)) >= 2 * heard.window]
    if len(kept) < count:
        seconds = 2 * heard.window / heard.rate
        print(f"{count - len(kept)} of {count} recordings are shorter than {seconds:g} s and are left out")
    return kept
