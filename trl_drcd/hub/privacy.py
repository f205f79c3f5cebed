"""Keep local paths and access tokens out of uploads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from safetensors import safe_open

from trl_drcd.validation.model_folders import is_hub_name
from trl_drcd.validation.saved_files import read_json

BASE_KEY = "base_model_name_or_path"
# Entries in which transformers and PEFT record where something was loaded from; not needed for loading
PLACE_KEYS = {"_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file"}
TEXTS = {".json", ".jsonl", ".yaml", ".md", ".jinja", ".txt"}
# Vocabularies, in which text like `/home/a` may be an ordinary entry
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
TOKEN = re.compile(r"\b(?:(?:hf_|api_org_|gh[pos]_)[A-Za-z0-9]{30,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{32,})")
ROOTS = (
    "home|root|Users|tmp|mnt|data|work|workspace|scratch|content|kaggle|var|opt|srv|media|fsx|gpfs|lustre|nfs|Volumes|"
    "private"
)
# Not that of an address, such as https://host/data/x, whose host comes before the path
PATH = re.compile(
    rf"file://\S+|(?:(?<![\w/.\-~])|(?<=\s-\w))(?:/|(?<!:)//|///+)(?:{ROOTS})/[\w.~-]+"
    r"|(?<!\w)[A-Z]:(?:\\\\?[\w.]+|/[\w. -]+/)"
)


def is_local(name: str) -> bool:
    """Whether a model's name is an existing local path, or is not a valid Hub name."""
    return Path(name).expanduser().exists() or not is_hub_name(name)


def content_to_push(name: str, path: Path, base_model: Sequence[str] | None = None) -> bytes | Path:
    """
    What to upload for a file: the file itself, or its content without local paths that the libraries recorded.

    Args:
        name (`str`): Path in the repository.
        path (`Path`): The file.
        base_model (`Sequence[str]`, *optional*): Hub name of an adapter's base.

    Returns:
        `Path` or `bytes`: The file, or its changed content.

    Raises:
        ValueError: If the file contains an access token or a local path that cannot be removed, or the base of an
            adapter is a local folder and `base_model` is not given.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as weights:
            check_text(name, json.dumps(weights.metadata() or {}))
        return path
    if path.suffix not in TEXTS:
        return path
    content: bytes | Path = path
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and name not in VOCABULARIES:
        original = read_json(path)
        cleaned = _without_places(original, base_model, path)
        if cleaned != original:
            text = json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
            content = text.encode()
    check_text(name, text, paths=name not in VOCABULARIES)
    return content


def check_text(name: str, text: str, paths: bool = True) -> None:
    """
    Check that a text contains no access token and, if `paths`, no local path.

    Raises:
        ValueError: If it does; the message gives the line, but does not show a token.
    """
    own = get_token()
    for number, line in enumerate(text.splitlines(), 1):
        if TOKEN.search(line) or (own and own in line):
            raise ValueError(f"{name}, line {number} contains an access token; remove it, and revoke that token")
        if paths and (found := PATH.search(line)):
            raise ValueError(
                f"{name}, line {number} contains a local path, {found.group()}...; remove it, or replace it by the "
                "name on the Hub"
            )


def _without_places(value: object, base_model: Sequence[str] | None, path: Path) -> Any:
    if isinstance(value, list):
        return [_without_places(entry, base_model, path) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, entry in value.items():
        if key in PLACE_KEYS and isinstance(entry, str) and is_local(entry):
            continue
        if key == BASE_KEY and isinstance(entry, str) and (base_model or is_local(entry)):
            entry = _base_on_hub(entry, base_model, path)
        kept[key] = _without_places(entry, base_model, path)
    return kept


def _base_on_hub(recorded: str, base_model: Sequence[str] | None, path: Path) -> str:
    if base_model is None or len(base_model) != 1:
        raise ValueError(
            f"{path} names the adapter's base by a local folder, {recorded}; push the base first, and give its name "
            f"on the Hub as `base_model`, such as user/{Path(recorded).name}"
        )
    return base_model[0]
