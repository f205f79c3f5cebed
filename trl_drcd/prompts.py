"""Load prompts from a file or the Hub, converting common column formats."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from trl_drcd.validation.prompt_files import read_rows
from trl_drcd.validation.rows import COLUMNS, check_rows

logger = logging.getLogger(__name__)

Turn = Mapping[str, Any]
Row = Mapping[str, Any]
Prompt = str | list[dict[str, str]]  # a text or the turns of a conversation

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def load_prompts(argument: str, name: str, split: str, streaming: bool = False) -> Any:
    """
    Load and validate `prompt` and, if present, `negative_prompt` and `teacher_prompt` of a local file or a Hub data
    set.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        name (`str`): A JSONL, CSV or Parquet file, or the name of a data set on the Hub.
        split (`str`): Split of the data set on the Hub.
        streaming (`bool`, *optional*, defaults to `False`): Read rows lazily, without checking all of them first.

    Returns:
        `Dataset`: At least one row, no empty prompt; an `IterableDataset` if `streaming`.

    Raises:
        FileNotFoundError: If neither the file nor a Hub data set of that name exists.
        ValueError: If the format is unknown, there are no rows, no column `prompt`, or a row without a prompt.
    """
    dataset = read_prompts(argument, name, split, streaming)
    check_rows(dataset, f"`{argument}={name}`")
    return dataset


def read_prompts(
    argument: str, name: str, split: str, streaming: bool = False, keep_columns: bool = False
) -> Dataset | IterableDataset:
    """
    [`load_prompts`] without validating the rows, for the trainer, which validates them itself.

    Rows with `messages` (chat), `conversations` (ShareGPT) or `instruction` and optionally `input` (Alpaca) are
    converted to prompts: the turns up to the last user turn, or a single user turn.

    Args:
        argument, name, split, streaming: See [`load_prompts`].
        keep_columns (`bool`, *optional*, defaults to `False`): Keep the other columns, which TRL passes to reward
            functions.

    Returns:
        `Dataset`: The prompts; an `IterableDataset` if `streaming`.

    Raises:
        FileNotFoundError: If neither the file nor a Hub data set of that name exists.
        ValueError: If the format is unknown, or the file is empty or unreadable.
    """
    dataset = read_rows(f"`{argument}={name}`", name, split, streaming)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    column = next((column for column in ("prompt", *CONVERSIONS) if column in columns), None)
    if column in CONVERSIONS:
        logger.warning(f"`{argument}={name}` has no column `prompt`: prompts are taken from `{column}`")
        dataset = dataset.map(_converted, fn_kwargs={"column": column})
    columns = ["prompt", *columns] if column else columns
    if column and not keep_columns:
        columns = [name for name in COLUMNS if name in columns]
        dataset = dataset.select_columns(columns)
    for name in COLUMNS[1:]:
        if isinstance(dataset, Dataset) and name in columns:
            kind = dataset.features[name]
            if getattr(kind, "dtype", None) == "float64" and not any(n is not None for n in dataset[name]):
                dataset = dataset.remove_columns(name)  # an empty CSV column, which is read as numbers
    return dataset


def _converted(row: Row, column: str) -> dict[str, Any]:
    """The prompt of a row, converted from another column."""
    return {"prompt": CONVERSIONS[column](row)}


def _from_messages(row: Row) -> list[dict[str, Any]]:
    return _up_to_the_user(row["messages"] or [])


def _from_sharegpt(row: Row) -> list[dict[str, Any]]:
    turns = row["conversations"] or []
    named = [
        {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} if "from" in turn else turn
        for turn in turns
    ]
    return _up_to_the_user(named)


def _from_alpaca(row: Row) -> list[dict[str, Any]]:
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    return [{"role": "user", "content": "\n\n".join(parts)}] if parts else []


def _up_to_the_user(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns up to the last user turn, without `None` entries (fields that only some rows have)."""
    last = max((number for number, turn in enumerate(turns) if turn.get("role") == "user"), default=-1)
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns[: last + 1]]


CONVERSIONS: dict[str, Callable[[Row], list[dict[str, Any]]]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
}


def with_system_prompt(row: Row, system_prompt: str) -> dict[str, Any]:
    """Prepend a system turn to the row's prompt and teacher's prompt, unless they have one; texts become turns."""

    def with_turn(prompt: Any) -> Any:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
        if isinstance(turns, list) and turns and turns[0].get("role") != "system":
            turns = [{"role": "system", "content": system_prompt}, *turns]
        return turns

    return {name: with_turn(row[name]) for name in ("prompt", "teacher_prompt") if name in row}


def distinct(prompts: Iterable[Any], count: int) -> list[Any]:
    """The first `count` distinct prompts (texts or conversations)."""
    return [json.loads(prompt) for prompt in list(dict.fromkeys(map(json.dumps, prompts)))[:count]]
