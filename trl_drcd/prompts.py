"""Prompts of a file or of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trl_drcd.validation.prompt_files import check_feature, empty_rows, read_file, read_from_hub

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(argument: str, name: str, split: str, streaming: bool = False) -> Any:
    """
    Prompts of a local file or of the hub, in the columns `prompt` and, where it is there, `negative_prompt`.

    Args:
        argument (`str`): What the user calls it, for the messages.
        name (`str`): A JSONL, CSV or Parquet file, or the name of a data set on the hub.
        split (`str`): Split of the data set on the hub.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed, without a look at all.

    Returns:
        `Dataset`: Not empty, no prompt empty; an `IterableDataset` where `streaming`.

    Raises:
        FileNotFoundError: If the name is that of a file, and there is none.
        ValueError: If the format is not known, there is no row, no column `prompt`, or a row without a prompt.
    """
    suffix = Path(name).suffix
    if suffix in FORMATS or Path(name).exists():
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"`{argument}={name}` is no file; give a JSONL, CSV or Parquet file, or a hub name"
            )
        if suffix not in FORMATS:
            raise ValueError(f"`{argument}={name}` has an unknown format; expected one of {sorted(FORMATS)}")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"`{argument}={name}` is empty; it must have at least one row with a `prompt`")
        dataset = read_file(f"`{argument}={name}`", name, FORMATS[suffix], streaming)
    else:
        dataset = read_from_hub(f"`{argument}={name}`", name, split, streaming)
    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know them before its first row
    if "prompt" not in columns:
        raise ValueError(f"`{argument}={name}` must have a column `prompt`, got columns {columns}")
    dataset = dataset.select_columns([c for c in ("prompt", "negative_prompt") if c in columns])
    for column, feature in (dataset.features or {}).items():
        check_feature(feature, f"column `{column}` of `{argument}={name}`")
    if streaming:
        return dataset
    if empty := empty_rows(dataset["prompt"]):
        raise ValueError(
            f"`{argument}={name}` has no prompt in rows {empty[:8]} ({len(empty)} in all); give each a prompt"
        )
    return dataset


def distinct(prompts: Iterable[Any], count: int) -> list[Any]:
    """The first `count` different prompts, texts or conversations."""
    return [json.loads(prompt) for prompt in list(dict.fromkeys(map(json.dumps, prompts)))[:count]]
