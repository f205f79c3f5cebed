"""Validate the columns `prompt`, `negative_prompt` and `teacher_prompt` of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, Value

COLUMNS = ("prompt", "negative_prompt", "teacher_prompt")
TEXTS = ("string", "large_string", "string_view", "null")
SHAPES = "it must contain texts or lists of turns with `role` and `content`"
CONVERTED = (
    "rename the column that holds the prompts, or give `messages`, `conversations` (ShareGPT) or `instruction` "
    "(Alpaca), which are converted"
)


def check_columns(where: str, columns: Iterable[str], refused: Iterable[str]) -> None:
    """
    Check that there is no column that a model family does not read, such as a voice to clone.

    Raises:
        ValueError: If one of `columns` is among those that are `refused`.
    """
    if found := set(refused).intersection(columns):
        raise ValueError(
            f"{where} has a column `{min(found)}`: cloning a voice from a prompt of audio is not supported; remove "
            "the column"
        )


def check_rows(dataset: Dataset | IterableDataset, where: str) -> None:
    """
    Check that every row has a prompt, either a text or a list of turns.

    For a stream, only the columns and their types are checked.

    Args:
        dataset (`Dataset` or `IterableDataset`): Data set with a column `prompt` and optionally `negative_prompt` and
            `teacher_prompt`.
        where (`str`): The user's argument with its value, for error messages.

    Raises:
        ValueError: If there are no rows, no column `prompt`, a row without a prompt, a prompt of another type, or a
            teacher's prompt that is a conversation where `prompt` is a text.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{where} is empty; it must have at least one row with a `prompt`")
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may need its first row to know them
    if "prompt" not in columns:
        raise ValueError(f"{where} must have a column `prompt`, got columns {columns}; {CONVERTED}")
    for column in COLUMNS:
        feature = (dataset.features or {}).get(column)
        if problem := feature is not None and _type_problem(feature):
            raise ValueError(f"column `{column}` of {where} {problem}; {SHAPES}")
    if not isinstance(dataset, Dataset):
        return
    if empty := [row for row, prompt in enumerate(dataset["prompt"]) if not prompt]:
        raise ValueError(
            f"{where} has no prompt in rows {empty[:8]} ({len(empty)} in total); give every row a prompt, or remove "
            "the row"
        )
    for column in set(COLUMNS) & set(columns):
        if not isinstance(dataset.features[column], Value):
            _check_turns(dataset[column], f"column `{column}` of {where}")
    if "teacher_prompt" in columns and not isinstance(dataset.features["teacher_prompt"], Value):
        for row, (prompt, taught) in enumerate(zip(dataset["prompt"], dataset["teacher_prompt"], strict=True)):
            if taught is not None and isinstance(prompt, str):
                raise ValueError(
                    f"{where} has in row {row} a `teacher_prompt` of turns and a `prompt` that is a text, which is "
                    "read without a chat template; give both as turns, or both as texts"
                )


def _type_problem(feature: object) -> str | None:
    """The problem with the type of a column; `None` if there is none or the type does not tell."""
    if isinstance(feature, Value):
        return None if feature.dtype in TEXTS else f"is of type {feature.dtype}"
    turn = getattr(feature, "feature", feature)
    if isinstance(turn, Value):
        return f"holds lists of {turn.dtype}"
    if isinstance(turn, Mapping) and not {"role", "content"} <= set(turn):
        return f"holds turns of {sorted(turn)}"
    return None  # turns, or untyped JSON


def _check_turns(column: Iterable[object], where: str) -> None:
    """Refuse turns without text, and texts among conversations, which TRL would render as conversations."""
    for row, prompt in enumerate(column):
        if prompt is not None and not _is_conversation(prompt):
            raise ValueError(
                f"{where} holds something else in row {row} ({type(prompt).__name__}); {SHAPES}, not both"
            )
        if kind := _other_than_text(prompt):
            raise ValueError(
                f"{where} has a part of type {kind!r} in row {row}: completions would be sampled with it but scored "
                "without it; use text-only prompts"
            )


def _other_than_text(prompt: object) -> str | None:
    """The type of the first part of a conversation that is no text, such as an image; `None` if there is none."""
    turns: Any = prompt or []
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    return next((str(kind) for kind in kinds if kind != "text"), None)


def _is_conversation(prompt: object) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return False
    return all(
        isinstance(t, Mapping) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str | list)
        for t in prompt
    )
