"""
Digests of the inputs of an evaluation: equal for equal contents, whatever the folder is called.

A row of `results.jsonl` is reused while its digest is unchanged, so a digest covers every file that is read: weights,
configuration, tokenizer, chat template, a user's own functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache

from trl_drcd.validation.model_folders import is_hub_name

DIGITS = 12
# Files in a model folder that are not read: reports, pictures, logs, pickles
UNREAD = {
    *("report.json", "trainer_state.json", "reference.safetensors", "all_results.json", "train_results.json"),
    "complete.json",  # of a checkpoint, with digests of its optimizer
}
UNREAD_SUFFIXES = {
    *(".md", ".png", ".svg", ".jpg", ".html", ".csv", ".log", ".jsonl", ".wav", ".tmp", ".lock"),
    *(".bin", ".pt", ".pth", ".pkl", ".h5", ".msgpack", ".onnx", ".ot"),
}  # fmt: skip


def content_digest(name: str | Path) -> str:
    """
    Digest, twelve hexadecimal digits, of a file or of the files that are read in a model's folder.

    The digest of a model on the Hub depends on its current revision; offline, on the revision in the cache.
    """
    path, digest = Path(name), hashlib.sha256()
    if not path.exists():
        digest.update(str(name).encode())
        digest.update((hub_revision(str(name)) or "").encode())
    for file in [path] if path.is_file() else sorted(_read_files(path)):
        _add(digest, file)
    return digest.hexdigest()[:DIGITS]


def weights_digest(folder: str | Path) -> str:
    """Digest, twelve hexadecimal digits, of the safetensors of a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        if file.name not in UNREAD:
            _add(digest, file)
    return digest.hexdigest()[:DIGITS]


def _add(digest: Any, file: Path) -> None:
    """Add a file's name and contents to a digest."""
    digest.update(file.name.encode())
    with open(file, "rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())


def _read_files(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that are read; for a sentence encoder also those in its modules' folders."""
    parts = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    if (folder / "modules.json").is_file():
        parts += [file for file in folder.rglob("*/*") if file.parent != folder]
    for file in dict.fromkeys(parts):
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and file.name not in UNREAD and file.suffix.lower() not in UNREAD_SUFFIXES:
            yield file


def hub_revision(name: str) -> str | None:
    """Current commit of a model on the Hub; offline, the cached one; `None` without either."""
    if not is_hub_name(name):
        return None
    try:
        return model_info(name, timeout=10).sha
    except Exception:  # connection errors come from the Hub client's HTTP library, which differs between versions
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None


def settings_digest(settings: object) -> str:
    """Digest, twelve hexadecimal digits, of anything that can be serialised to JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:DIGITS]
