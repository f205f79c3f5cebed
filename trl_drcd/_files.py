"""Files written to a temporary name and then renamed, so that nobody ever reads half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._extras import require


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) in one piece; its folder is made, an existing file replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_wav(path: str | Path, waveform: Any, sampling_rate: int) -> None:
    """
    Write a waveform as a 16-bit WAV file in one piece; its folder is made, an existing file replaced.

    Args:
        path (`str` or `Path`): The file.
        waveform (`torch.Tensor` or array): Shape `(T,)`, float samples in `[-1, 1]`.
        sampling_rate (`int`): In Hz.

    Raises:
        ImportError: If soundfile is missing; it comes with the extra `audio`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    samples = waveform.numpy() if hasattr(waveform, "numpy") else waveform
    require("soundfile", "audio").write(temporary, samples, sampling_rate, subtype="PCM_16", format="WAV")
    os.replace(temporary, path)
