"""Data sets of prompts: files read with errors that name the line, and what a column of prompts may hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from datasets import Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from trl_drcd.validation.model_folders import is_hub_name

REMEDIES = {
    "json": "it must hold one JSON object on each line",
    "csv": "all its lines must have the same columns as the first",
    "parquet": "copy or save it again",
}


def read_file(where: str, name: str, kind: str, streaming: bool) -> Any:
    """
    The rows of a JSONL, CSV or Parquet file.

    Args:
        where (`str`): What the user calls it, for the messages.
        name (`str`): The file.
        kind (`str`): `"json"`, `"csv"` or `"parquet"`.
        streaming (`bool`): Read rows as they are needed, without a look at all.

    Raises:
        ValueError: If it cannot be read; of JSONL the message says in which line.
    """
    if name.endswith(".jsonl") and not streaming:
        check_lines(where, name)
    try:
        return load_dataset(kind, data_files=name, split="train", streaming=streaming)
    except (DatasetGenerationError, ArrowInvalid, UnicodeDecodeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{where} cannot be read: {cause}; {REMEDIES[kind]}") from error


def check_lines(where: str, name: str) -> None:
    """
    Refuse a JSONL file with a line that is no object, or whose prompt is neither a text nor a list of turns.

    Raises:
        ValueError: At the first such line.
    """
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            at = f"{where}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{at} is no text in UTF-8; save the file as JSON lines in UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{at} is no JSON ({error}); {REMEDIES['json']}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{at} holds {type(row).__name__}; {REMEDIES['json']}")
            for column in ("prompt", "negative_prompt"):
                if not isinstance(row.get(column), str | list | None):
                    kind = type(row[column]).__name__
                    raise ValueError(f"{at} has a `{column}` of type {kind}; give a text or list of turns")
                if any("\ud800" <= character <= "\udfff" for character in str(row.get(column))):
                    raise ValueError(f"{at} has half a character in `{column}`; it must be valid Unicode")


def read_from_hub(where: str, name: str, split: str, streaming: bool) -> Any:
    """
    A data set of the hub.

    Raises:
        FileNotFoundError: If it is not there, or cannot be reached.
    """
    remedy = "give a JSONL, CSV or Parquet file, or a hub name"
    if not is_hub_name(name):
        raise FileNotFoundError(f"{where} is no file; {remedy}")
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except OSError as error:
        cause = " ".join(str(error).split())
        raise FileNotFoundError(f"{where} is no file, and nothing of the hub ({cause}); {remedy}") from error


def check_feature(feature: Any, where: str) -> None:
    """
    Prompts are texts, or lists of turns with `role` and `content`.

    Args:
        feature (`datasets.Value` or other): The type of the column.
        where (`str`): Which column, for the message.

    Raises:
        ValueError: If they are something else.
    """
    if isinstance(feature, Value):
        if feature.dtype not in ("string", "large_string", "string_view", "null"):
            raise ValueError(f"{where} is of type {feature.dtype}; it must hold texts or lists of turns")
        return
    turn = getattr(feature, "feature", None)
    keys = sorted(turn) if isinstance(turn, dict) else feature
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        raise ValueError(f"{where} has {keys}; it must hold texts, or lists of turns with `role` and `content`")


def empty_rows(prompts: Iterable[Any]) -> list[int]:
    """The prompts that are an empty text, a conversation without turns, or nothing."""
    return [row for row, prompt in enumerate(prompts) if not prompt]
