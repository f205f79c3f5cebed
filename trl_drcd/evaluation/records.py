"""What an evaluation keeps: lines of `results.jsonl`, the drawn tokens, some completions, and what each depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from trl_drcd.evaluation.sampling import Samples
from trl_drcd.files import wav_bytes, write_bytes, write_text

# Files of a model's folder that do not change what it computes
IGNORED = {"report.json", "trainer_state.json", "reference.safetensors"}


def content_digest(name: str | Path) -> str:
    """
    Twelve hexadecimal digits that change with the content of a file, or with weights, configuration and tokenizer of a
    model's folder; of what is no local path, digits of its name.
    """
    path, digest = Path(name), hashlib.sha256()
    if not path.exists():
        digest.update(str(name).encode())
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("[0-9]_*/*")]
    for file in sorted(files):
        if path.is_file() or (file.suffix in (".json", ".safetensors") and file.name not in IGNORED):
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def settings_digest(settings: Any) -> str:
    """Twelve hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- results.jsonl


def append_line(file: Path, result: dict[str, Any]) -> None:
    """One line more, on the disk before this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """
    All lines of a `results.jsonl`, in order; a torn last line is taken off.

    Raises:
        ValueError: If another line is no result.
    """
    if not file.exists():
        return []
    text = file.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(file, text)
    return parse_lines(file, text, {"settings", "metrics", "per_prompt"})


def parse_lines(file: str | Path, text: str, needed: set[str]) -> list[dict[str, Any]]:
    """
    The results in the text of a `results.jsonl`; each has the `needed` entries.

    Raises:
        ValueError: If a line is none.
    """
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict) or not needed <= set(result):
            raise ValueError(f"{file}, line {number} is no result of an evaluation; remove that line, or the file")
        results.append(result)
    return results


def write_lines(file: Path, results: Iterable[dict[str, Any]]) -> None:
    """The whole of a `results.jsonl`, in one piece."""
    write_text(file, "".join(json.dumps(result) + "\n" for result in results))


# ---------------------------------------------------------------- samples


def keep_tokens(file: Path, samples: Samples, settings: str) -> None:
    """Writes drawn tokens, so that another judge needs no other draw."""
    ids = torch.tensor([token for sequence in samples.token_ids for token in sequence], dtype=torch.int32)
    lengths = torch.tensor([len(sequence) for sequence in samples.token_ids], dtype=torch.int32)
    metadata = {"settings": settings, "seconds": repr(samples.seconds)}
    write_bytes(file, save({"ids": ids, "lengths": lengths}, metadata))


def kept_tokens(file: Path, prompts: list[Any], samples_per_prompt: int, settings: str) -> Samples | None:
    """What [`keep_tokens`] wrote with these settings; `None` where there is nothing."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as content:
        if content.metadata()["settings"] != settings:
            return None
        ids, lengths = content.get_tensor("ids"), content.get_tensor("lengths")
        seconds = float(content.metadata()["seconds"])
    token_ids = [part.tolist() for part in ids.split(lengths.tolist())]
    return Samples(list(prompts), token_ids, samples_per_prompt, seconds)


def keep_samples(folder: Path, items: list[Any]) -> None:
    """Writes completions as `00.wav`, ... or `00.txt`, ..., in place of those that were there."""
    for path in folder.glob("[0-9]*"):
        path.unlink()
    for number, item in enumerate(items):
        if isinstance(item, str):
            write_text(folder / f"{number:02d}.txt", item)
        else:
            write_bytes(folder / f"{number:02d}.wav", wav_bytes(*item))


def read_samples(folder: Path) -> list[Any]:
    """What [`keep_samples`] wrote."""
    from trl_drcd.compat.extras import require

    items: list[Any] = []
    for path in sorted(folder.glob("[0-9]*")):
        if path.suffix == ".txt":
            items.append(path.read_text())
        else:
            waveform, rate = require("soundfile", "audio").read(path, dtype="float32")
            items.append((torch.from_numpy(waveform), rate))
    return items
