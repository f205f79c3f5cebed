"""
The folder `samples/` of an evaluation: all token ids, and some completions to listen to or read.

Each folder of completions has a `samples.jsonl` that maps files to prompts. Reports and the app read it, so captions
do not depend on how the prompts were chosen.
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
    """Save sampled token ids, so that another judge can score them without sampling again."""
    ids = torch.tensor([token for sequence in samples.token_ids for token in sequence], dtype=torch.int32)
    lengths = torch.tensor([len(sequence) for sequence in samples.token_ids], dtype=torch.int32)
    write_bytes(file, save({"ids": ids, "lengths": lengths}, {"seconds": repr(samples.seconds)}))


def kept_tokens(
    file: Path, held_out: HeldOut, samples_per_prompt: int, chat_template_kwargs: dict[str, Any] | None
) -> Samples | None:
    """Read a file written by [`keep_tokens`]; `None` if it does not exist."""
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
        prompt (`str` or `list`): Its prompt, a text or a conversation.
        file (`Path`): A WAV or text file.
    """

    prompt: Prompt
    file: Path

    @property
    def is_text(self) -> bool:
        """Whether the completion is text."""
        return self.file.suffix == ".txt"

    def text(self) -> str:
        """Read the completion, if it is text."""
        return self.file.read_text(encoding="utf-8")

    def spectrogram(self) -> Path:
        """Path of the PNG spectrogram beside the WAV file; drawn if it does not exist yet."""
        picture = self.file.with_suffix(".png")
        if not picture.exists():
            waveform, rate = require("soundfile", "audio").read(self.file, dtype="float32")
            write_bytes(picture, spectrogram_png(torch.from_numpy(waveform.T), rate))
        return picture


def heard(prompts: int, listen: int) -> list[int]:
    """Indices of the prompts whose completions are kept: at most `listen`, evenly spaced."""
    return list(range(0, prompts, max(1, prompts // max(1, listen))))[:listen]


def keep_completions(
    folder: Path, samples: Samples, completions: Sequence[Completion], listen: int, listen_samples: int
) -> None:
    """
    Write completions as `{prompt:02d}_{sample}.wav` or `.txt`, with their index.

    Args:
        folder (`Path`): Output folder; other completions that are already in it are removed.
        samples ([`Samples`]): The samples, for their prompts.
        completions (`list`): All decoded completions, those of a prompt contiguous.
        listen (`int`): Number of prompts whose completions are kept.
        listen_samples (`int`): Largest number of completions kept of each.
    """
    lines, names = [], {INDEX}
    for number, prompt in enumerate(heard(len(samples.prompts), listen)):
        first = prompt * samples.samples_per_prompt
        for sample in range(min(listen_samples, samples.samples_per_prompt)):
            item = completions[first + sample]
            name = f"{number:02d}_{sample}.{'txt' if isinstance(item, str) else 'wav'}"
            names.add(name)
            write_bytes(folder / name, item.encode() if isinstance(item, str) else wav_bytes(*item))
            lines.append(json.dumps({"prompt": samples.prompts[prompt], "file": name}))
    write_text(folder / INDEX, "".join(f"{line}\n" for line in lines))
    for path in folder.glob("[0-9]*"):  # last, for another process may be reading the same row
        if path.name not in names:
            path.unlink(missing_ok=True)


def read_clips(folder: Path) -> list[Clip]:
    """The kept completions of a folder; empty if it does not exist."""
    index = folder / INDEX
    lines = index.read_text(encoding="utf-8").split("\n") if index.is_file() else []
    entries = [json.loads(line) for line in lines if line]
    return [Clip(entry["prompt"], folder / Path(entry["file"]).name) for entry in entries]


def spectrogram_png(waveform: torch.Tensor, sampling_rate: int, max_hertz: float = 4000.0) -> bytes:
    """
    Spectrogram as a PNG image: time from left to right, frequency from bottom to top, a range of 60 dB.

    Args:
        waveform (`torch.Tensor`): Float samples, shape `(T,)`, or `(C, T)`, of which the mean over channels is shown.
        sampling_rate (`int`): Sampling rate, Hz.
        max_hertz (`float`, *optional*, defaults to 4000.0): Frequency of the upper edge, Hz.

    Returns:
        `bytes`: The PNG file.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    n_fft = 2048
    window, waveform = torch.hann_window(n_fft), waveform if waveform.ndim == 1 else waveform.mean(0)
    spectrum = torch.stft(waveform, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)
    bins = max(1, min(n_fft // 2, round(max_hertz * n_fft / sampling_rate)))
    decibels = 20 * spectrum[:bins].abs().clamp(min=1e-5).log10()
    colours = require("matplotlib", "plot").colormaps["magma"](range(256), bytes=True)[:, :3]
    from PIL import Image  # a dependency of matplotlib

    # With a palette: a byte per pixel to compress in place of four
    places = ((decibels - decibels.max()) / 60 + 1).mul(256).clamp(0, 255).to(torch.uint8)
    image, file = Image.fromarray(places.flip(0).numpy()), io.BytesIO()
    image.putpalette(colours.tobytes())
    image.save(file, "png")
    return file.getvalue()
