"""Read prompts from files and Hub data sets; errors name the file and, for JSON lines, the line."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from trl_drcd.validation.messages import is_valid_unicode
from trl_drcd.validation.model_folders import is_hub_name
from trl_drcd.validation.rows import COLUMNS

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
KINDS = "give a JSONL, CSV or Parquet file, or a Hub name"
REMEDIES = {
    "json": "it must hold one JSON object on each line",
    "csv": "all its lines must have the same columns as the first",
    "parquet": "copy or save it again",
}


def read_rows(where: str, name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """
    The rows of a JSONL, CSV or Parquet file, or of a data set on the Hub.

    Args:
        where (`str`): The user's argument with its value, for error messages.
        name (`str`): Path of the file, or name on the Hub.
        split (`str`): Split of the data set on the Hub.
        streaming (`bool`): Read rows lazily, without checking all of them first.

    Returns:
        `Dataset` or `IterableDataset`: The rows; an `IterableDataset` if `streaming`.

    Raises:
        FileNotFoundError: If neither the file nor a Hub data set of that name exists.
        ValueError: If the format is unknown, or the file is empty or unreadable.
    """
    path = Path(name)
    if path.suffix not in FORMATS and not path.exists():
        return _read_from_hub(where, name, split, streaming)
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file; {KINDS}")
    if path.suffix not in FORMATS:
        raise ValueError(f"{where} has an unknown format; expected one of {sorted(FORMATS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{where} is empty; it must have at least one row with a `prompt`")
    return _read_file(where, name, FORMATS[path.suffix], streaming)


def _read_file(where: str, name: str, kind: str, streaming: bool) -> Dataset | IterableDataset:
    """The rows of a file of one of [`FORMATS`]."""
    if name.endswith(".jsonl") and not streaming:
        _check_lines(where, name)
    try:
        return load_dataset(kind, data_files=name, split="train", streaming=streaming)
    except (DatasetGenerationError, ArrowInvalid, UnicodeDecodeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{where} cannot be read: {cause}; {REMEDIES[kind]}") from error


def _read_from_hub(where: str, name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """A data set of the Hub, or of its cache."""
    if not is_hub_name(name):
        raise FileNotFoundError(f"{where} is not a file; {KINDS}")
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except OSError as error:
        cause = " ".join(str(error).split())
        raise FileNotFoundError(f"{where} is not a file, and not found on the Hub ({cause}); {KINDS}") from error


def _check_lines(where: str, name: str) -> None:
    """Check each JSON line: pyarrow reports no line number, and silently converts some values."""
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            if problem := line.strip() and _line_problem(line):
                raise ValueError(f"{where}, line {number} {problem}")


def _line_problem(line: bytes) -> str | None:
    """The problem with a line of JSON and its fix; `None` if it is valid."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "is not valid UTF-8; save the file as JSON lines in UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error}); {REMEDIES['json']}"
    if not isinstance(row, dict):
        return f"holds {type(row).__name__}; {REMEDIES['json']}"
    for column in COLUMNS:
        if not isinstance(row.get(column), str | list | None):
            return f"has a `{column}` of type {type(row[column]).__name__}; give a text or list of turns"
        if not is_valid_unicode(str(row.get(column))):
            return f"has an unpaired surrogate in `{column}`; it must be valid Unicode"
    return None
