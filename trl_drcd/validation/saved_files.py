"""JSON and safetensors files of saved models: read with errors that name the file; a pickle is never read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


def read_json(file: str | Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give the folder of a saved model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of UTF-8 too
        raise ValueError(f"{path} is no JSON ({error}); copy or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; copy or save it again")
    return content


def arguments_of(kind: Any, config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """
    The entries of a configuration that are the arguments of a class, checked against its signature.

    Raises:
        ValueError: If an entry is unknown or missing, or has not the type that is annotated.
    """
    parameters = inspect.signature(kind, eval_str=True).parameters
    if unknown := sorted(set(config) - set(parameters)):
        raise ValueError(f"{where} has unknown entries {unknown}; known are {sorted(parameters)}")
    if lacking := [n for n, p in parameters.items() if p.default is p.empty and n not in config]:
        raise ValueError(f"{where} lacks {lacking}; copy or save it again")
    for name, value in config.items():
        kinds = parameters[name].annotation
        if kinds in (int, float) and (isinstance(value, bool) or not isinstance(value, int | kinds)):
            raise ValueError(f"{where} has `{name}={value!r}`; it must be a number")
    return config


def load_state(model: Any, file: Path) -> None:
    """
    Fill a module from a safetensors file.

    Raises:
        FileNotFoundError, ValueError: As [`open_safetensors`] does, or if the tensors are not those of the module.
    """
    with open_safetensors(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        cause = str(error).splitlines()[1].strip()
        raise ValueError(f"{file} does not fit its config.json ({cause}); copy or save both again") from error


def open_safetensors(file: Path) -> Any:
    """
    A safetensors file, its header read and its length compared with it, no tensor read.

    Raises:
        FileNotFoundError: If it is not there; the message says so where a pickle lies in its place.
        ValueError: If it is torn, or something else.
    """
    if not file.is_file():
        pickles = sorted(p.name for p in file.parent.glob("*") if p.suffix in PICKLES)
        instead = (
            f"; {pickles[0]} is a pickle, which could run code when it is read: save the model as safetensors"
            if pickles
            else "; give a folder of `save_pretrained`, with safetensors files"
        )
        raise FileNotFoundError(f"{file.parent} has no {file.name}{instead}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is torn, or no safetensors file ({error}); copy or save it again") from error


def weight_files(folder: Path) -> list[str]:
    """
    Names of the safetensors files of a checkpoint, in one file or in shards.

    Where a single file lies beside an index, transformers loads the single file, and so it is named here; the index
    is checked all the same.

    Raises:
        ValueError: If the index of the shards is broken, or names a file outside the folder.
    """
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / INDEX} must hold a `weight_map`; copy or save it again")
    for name in shards.values():
        if not isinstance(name, str) or PurePath(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{folder / INDEX} names the file {name!r}; shards must lie in the folder itself")
    return [WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(set(shards.values()))
