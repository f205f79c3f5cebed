"""
Digests of what an evaluation reads: equal where the contents are equal, whatever their names.

A row of `results.jsonl` is not measured again while its digest stays the same, so a digest covers every file that is
read: weights, configuration, tokenizer, chat template, a user's own functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import model_info, try_to_load_from_cache

from trl_drcd.validation.model_folders import is_hub_name

DIGITS = 12
# What lies in the folder of a model and is not read: reports, pictures, logs, pickles
UNREAD = {"report.json", "trainer_state.json", "reference.safetensors", "all_results.json", "train_results.json"}
UNREAD_SUFFIXES = {
    *(".md", ".png", ".svg", ".jpg", ".html", ".csv", ".log", ".jsonl", ".wav", ".tmp", ".lock"),
    *(".bin", ".pt", ".pth", ".pkl", ".h5", ".msgpack", ".onnx", ".ot"),
}  # fmt: skip


def content_digest(name: str | Path) -> str:
    """
    Twelve hexadecimal digits that change with the content of a file, or with what is read of a model's folder.

    Of a model on the Hub they change with its revision there; offline, with the revision in the cache.
    """
    path, digest = Path(name), hashlib.sha256()
    if not path.exists():
        digest.update(str(name).encode())
        digest.update((hub_revision(str(name)) or "").encode())
    for file in [path] if path.is_file() else sorted(_read_files(path)):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:DIGITS]


def _read_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that are read; of a sentence encoder, those of its modules' folders too."""
    parts = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    if (folder / "modules.json").is_file():
        parts += [file for file in folder.rglob("*/*") if file.parent != folder]
    for file in dict.fromkeys(parts):
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and file.name not in UNREAD and file.suffix.lower() not in UNREAD_SUFFIXES:
            yield file


def hub_revision(name: str) -> str | None:
    """The commit that a name on the Hub stands for now; offline, the one in the cache; `None` without either."""
    if not is_hub_name(name):
        return None
    try:
        return model_info(name, timeout=10).sha
    except Exception:  # errors of the connection are those of the Hub client's HTTP library, which varies
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None


def settings_digest(settings: object) -> str:
    """Twelve hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:DIGITS]
