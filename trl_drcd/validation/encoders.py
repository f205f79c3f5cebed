"""Validate checkpoints of sentence-transformers before loading: no code from elsewhere, no pickles."""

from __future__ import annotations

import json
from pathlib import Path

from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.model_folders import is_hub_name
from trl_drcd.validation.saved_files import PICKLES, read_json


def check_encoder(argument: str, name: str, what: str = "a sentence encoder") -> None:
    """
    Check a local folder of a sentence encoder or a cross-encoder. Hub names are left to sentence-transformers.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        name (`str`): A folder, or a name on the Hub.
        what (`str`, *optional*, defaults to `"a sentence encoder"`): What it should be, for error messages.

    Raises:
        FileNotFoundError: If the path does not exist, or its weights are not safetensors.
        ValueError: If modules.json is broken, or names modules that are not of sentence_transformers.
    """
    where, folder = f"`{argument}={name}`", Path(name)
    if not folder.is_dir():
        if folder.exists() or not is_hub_name(name):
            raise FileNotFoundError(f"{where} is not a folder; give the folder of {what}, or a Hub name")
        return
    if (folder / "modules.json").is_file():
        for kind in _module_types(where, folder / "modules.json"):
            if not kind.startswith("sentence_transformers."):
                raise ValueError(
                    f"{where} names a module of type {kind!r} in modules.json, which is code from elsewhere; give "
                    f"{what} made of modules of sentence_transformers"
                )
    for file in sorted(folder.rglob("*")):
        if file.suffix in PICKLES and not list(file.parent.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{where} has no safetensors beside {file.relative_to(folder)}, a pickle, which could run code when "
                f"loaded; save {what} as safetensors"
            )
    if not (folder / "modules.json").is_file() and any(
        str(name).endswith("ForCausalLM") for name in _architectures(argument, folder)
    ):
        raise ValueError(
            f"{where} is a causal LM, which was not trained to compare texts; give {what}, such as those of "
            "sentence-transformers"
        )


def _architectures(argument: str, folder: Path) -> list[object]:
    """`architectures` of a config.json, if there is one."""
    file = folder / "config.json"
    with prefix_errors(argument):
        return read_json(file).get("architectures") or [] if file.is_file() else []


def _module_types(where: str, file: Path) -> list[str]:
    """The types in a modules.json, a list of objects."""
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also invalid UTF-8
        raise ValueError(f"{where}: {file} is not valid JSON ({error}); copy or save it again") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{where}: {file} must hold a list of modules; copy or save it again")
    return [str(module.get("type")) for module in modules]
