"""Files written to a temporary name and then renamed, so that nobody ever reads half of one."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_drcd.compat.extras import require


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in one piece; its folder is made, an existing file replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """[`write_bytes`] of a text in UTF-8."""
    write_bytes(path, text.encode())


def remove_temporaries(folder: str | Path) -> None:
    """Removes what [`write_bytes`] has left in a folder where its process died; files of living ones stay."""
    for path in Path(folder).glob(".*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def plain_name(text: str, length: int = 80) -> str:
    """
    A text as a name for files and log entries: letters, digits, spaces and a few marks, at most `length` of them.

    What stands for something in a path, a page or a shell becomes `_`, and so does what cannot be seen.
    """
    kept = "".join(c if c.isalnum() or c in " ,;-_+()!" else "_" for c in text)
    return kept[:length].strip() or "_"


def distinct_names(texts: Sequence[str]) -> list[str]:
    """[`plain_name`] of each text, with its number before it where an earlier one has the same name."""
    names: list[str] = []
    for number, text in enumerate(texts):
        name = plain_name(text)
        names.append(plain_name(f"{number} {name}") if name in names else name)
    return names


def wav_bytes(waveform: Any, sampling_rate: int) -> bytes:
    """
    The content of a 16-bit WAV file.

    Args:
        waveform (`torch.Tensor`): Shape `(T,)`, float samples in `[-1, 1]`, on the CPU.
        sampling_rate (`int`): In Hz.

    Returns:
        `bytes`: For [`write_bytes`], or to be embedded in a page.

    Raises:
        ImportError: If soundfile is missing; it comes with the extra `audio`.
    """
    file = io.BytesIO()
    require("soundfile", "audio").write(file, waveform.numpy(), sampling_rate, subtype="PCM_16", format="WAV")
    return file.getvalue()


def local_name(path: str) -> str:
    """The last part of a local path; a hub name as it is."""
    return Path(path).resolve().name if Path(path).exists() else path
