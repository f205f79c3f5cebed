"""
What is kept of samples in the folder `samples/` of an evaluation: all token ids, and some completions to listen to.

Each folder of completions has a `samples.jsonl` that says which file is of which prompt; whoever shows them reads it
there, so that no caption depends on how the prompts were chosen.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from trl_drcd.compat.extras import require
from trl_drcd.evaluation.plan import HeldOut
from trl_drcd.evaluation.sampling import Completion, Prompt, Samples
from trl_drcd.files import wav_bytes, write_bytes, write_text

INDEX = "samples.jsonl"


# ---------------------------------------------------------------- token ids


def keep_tokens(file: Path, samples: Samples) -> None:
    """Writes drawn tokens, so that another judge needs no other draw; the file's name says what they depend on."""
    ids = torch.tensor([token for sequence in samples.token_ids for token in sequence], dtype=torch.int32)
    lengths = torch.tensor([len(sequence) for sequence in samples.token_ids], dtype=torch.int32)
    write_bytes(file, save({"ids": ids, "lengths": lengths}, {"seconds": repr(samples.seconds)}))


def kept_tokens(
    file: Path, held_out: HeldOut, samples_per_prompt: int, chat_template_kwargs: dict[str, Any] | None
) -> Samples | None:
    """What [`keep_tokens`] wrote; `None` where there is nothing."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as content:
        ids, lengths = content.get_tensor("ids"), content.get_tensor("lengths")
        seconds = float(content.metadata()["seconds"])
    token_ids = [part.tolist() for part in ids.split(lengths.tolist())]
    others = held_out.negative_prompts, chat_template_kwargs, held_out.teacher_prompts
    return Samples(held_out.prompts, token_ids, samples_per_prompt, seconds, *others)


# ---------------------------------------------------------------- completions


@dataclass(frozen=True)
class Clip:
    """
    A kept completion.

    Args:
        prompt (`str` or `list`): What it is of.
        file (`Path`): A WAV file, or a text file.
    """

    prompt: Prompt
    file: Path

    @property
    def is_text(self) -> bool:
        """Whether it is a text."""
        return self.file.suffix == ".txt"

    def text(self) -> str:
        """The completion, of a text."""
        return self.file.read_text(encoding="utf-8")

    def spectrogram(self) -> Path:
        """A picture of the completion, of a sound, beside it; drawn where it is not there yet."""
        picture = self.file.with_suffix(".png")
        if not picture.exists():
            waveform, rate = require("soundfile", "audio").read(self.file, dtype="float32")
            write_bytes(picture, spectrogram_png(torch.from_numpy(waveform.T), rate))
        return picture


def heard(prompts: int, listen: int) -> list[int]:
    """The numbers of the prompts whose completions are kept: `listen` of them, evenly spread."""
    return list(range(0, prompts, max(1, prompts // max(1, listen))))[:listen]


def keep_completions(
    folder: Path, samples: Samples, completions: Sequence[Completion], listen: int, listen_samples: int
) -> None:
    """
    Writes completions as `00_0.wav`, `00_1.wav`, ... or `.txt`: prompt, sample.

    Args:
        folder (`Path`): Whose earlier completions are removed.
        samples ([`Samples`]): Whose prompts they are of.
        completions (`list`): All of them, those of a prompt contiguous.
        listen (`int`): Prompts of which some are kept.
        listen_samples (`int`): Completions of each, or as many as there are.
    """
    for path in folder.glob("[0-9]*"):
        path.unlink()
    lines = []
    for number, prompt in enumerate(heard(len(samples.prompts), listen)):
        first = prompt * samples.samples_per_prompt
        for sample in range(min(listen_samples, samples.samples_per_prompt)):
            item = completions[first + sample]
            name = f"{number:02d}_{sample}.{'txt' if isinstance(item, str) else 'wav'}"
            write_bytes(folder / name, item.encode() if isinstance(item, str) else wav_bytes(*item))
            lines.append(json.dumps({"prompt": samples.prompts[prompt], "file": name}))
    write_text(folder / INDEX, "".join(f"{line}\n" for line in lines))


def read_clips(folder: Path) -> list[Clip]:
    """The kept completions of a folder; none where it is not there."""
    index = folder / INDEX
    lines = index.read_text(encoding="utf-8").split("\n") if index.is_file() else []
    entries = [json.loads(line) for line in lines if line]
    return [Clip(entry["prompt"], folder / Path(entry["file"]).name) for entry in entries]


def spectrogram_png(waveform: torch.Tensor, sampling_rate: int, max_hertz: float = 4000.0) -> bytes:
    """
    A PNG image of a spectrogram: time from left to right, frequency from bottom to top, 60 dB from dark to bright.

    Args:
        waveform (`torch.Tensor`): Shape `(T,)`, or `(C, T)`, whose mean is shown; float samples.
        sampling_rate (`int`): In Hz.
        max_hertz (`float`, *optional*, defaults to 4000.0): Frequency of the upper edge.

    Returns:
        `bytes`: The file.

    Raises:
        ImportError: If matplotlib is missing; it comes with the extra `plot`.
    """
    n_fft = 2048
    window, waveform = torch.hann_window(n_fft), waveform if waveform.ndim == 1 else waveform.mean(0)
    spectrum = torch.stft(waveform, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)
    bins = max(1, min(n_fft // 2, round(max_hertz * n_fft / sampling_rate)))
    decibels = 20 * spectrum[:bins].abs().clamp(min=1e-5).log10()
    file = io.BytesIO()
    require("matplotlib.image", "plot").imsave(
        file, decibels.numpy(), cmap="magma", origin="lower", vmin=decibels.max() - 60, vmax=decibels.max()
    )
    return file.getvalue()
