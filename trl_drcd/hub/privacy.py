"""Nothing of this machine in what is uploaded: no path, no token."""

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
# What transformers and PEFT note of where something was loaded from, and do not need
PLACE_KEYS = {"_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file"}
TEXTS = {".json", ".jsonl", ".yaml", ".md", ".jinja", ".txt"}
# Words of a language, in which `/home/a` may stand as `hello` does
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
TOKEN = re.compile(r"\b(?:(?:hf_|api_org_|gh[pos]_)[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,})")
PATH = re.compile(
    r"(?<![\w:/.\-~])(?:/(?:home|root|Users|tmp|mnt|data|work|workspace|scratch|content|kaggle|var|opt|srv|media)"
    r"/[\w.~-]+|[A-Z]:\\\\?[\w.]+)"
)


def is_local(name: str) -> bool:
    """Whether a model's name is a folder of this machine, or could be nothing else."""
    return Path(name).expanduser().exists() or not is_hub_name(name)


def content_to_push(name: str, path: Path, base_model: Sequence[str] | None = None) -> bytes | Path:
    """
    What goes to the Hub of a file: the file, or its content without the places that things were loaded from.

    Args:
        name (`str`): In the repository.
        path (`Path`): The file.
        base_model (`Sequence[str]`, *optional*): Name on the Hub of an adapter's base.

    Raises:
        ValueError: If the file holds a token or a path of this machine that cannot be taken out, or the base of an
            adapter is a folder and `base_model` does not say what it is on the Hub.
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
    Refuse a text with a token, or with a path of this machine.

    Raises:
        ValueError: With the line of the first; a token itself is not shown.
    """
    own = get_token()
    for number, line in enumerate(text.splitlines(), 1):
        if TOKEN.search(line) or (own and own in line):
            raise ValueError(f"{name}, line {number} holds an access token; take it out, and revoke that token")
        if paths and (found := PATH.search(line)):
            raise ValueError(
                f"{name}, line {number} holds a path of this machine, {found.group()}...; take it out, or write the "
                "name on the Hub there"
            )


def _without_places(value: Any, base_model: Sequence[str] | None, path: Path) -> Any:
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
            f"{path} names the adapter's base by a folder of this machine, {recorded}; push the base first, and give "
            f"its name on the Hub as `base_model`, such as user/{Path(recorded).name}"
        )
    return base_model[0]
