"""Read JSON and safetensors files of saved models; errors name the file. Pickle files are never read."""

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
    Read the object in a JSON file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a JSON object.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give the folder of a saved model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also invalid UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); copy or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; copy or save it again")
    return content


def arguments_of(kind: Any, config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """
    Check the entries of a configuration against the signature of the class that takes them as arguments.

    Args:
        kind (`Any`): The class.
        config (`dict`): The entries.
        where (`str` or `Path`): File of the configuration, for error messages.

    Returns:
        `dict`: `config`, unchanged.

    Raises:
        ValueError: If an entry is unknown or missing, or a number has the wrong type.
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
    Load the weights of a module from a safetensors file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is broken, or its tensors do not match the module's.
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
    Open a safetensors file: reads the header and checks the file's length, without reading tensors.

    Raises:
        FileNotFoundError: If it does not exist; the message mentions a pickle file in the same folder.
        ValueError: If it is truncated or not a safetensors file.
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
        raise ValueError(f"{file} is truncated, or not a safetensors file ({error}); copy or save it again") from error


def weight_files(folder: Path) -> list[str]:
    """
    Names of the safetensors files of a checkpoint: a single file, or shards.

    If there are both a single file and an index, transformers loads the single file, so that one is returned; the
    index is still checked.

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
