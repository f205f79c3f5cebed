"""Models from outside: what a folder holds is looked at before it is loaded, and nothing in it is ever run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NO_SUCH = "transformers has no such model: name one that it has, or install the version that does"
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
    except ValueError as error:  # of UTF-8 too
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
    return sorted(set(shards.values()))


def check_model(argument: str, name: str | Path, trust_remote_code: bool | None = None) -> None:
    """
    Look at a local folder before a model is loaded from it; names of the hub are left to transformers.

    Args:
        argument (`str`): What the user calls it, for the messages.
        name (`str` or `Path`): A folder, or a name on the hub.
        trust_remote_code (`bool`, *optional*): Whether its own code may be run; `None` where nobody can say so.

    Raises:
        FileNotFoundError: If a path is none, or there is no model or no safetensors in it.
        ValueError: If a file is broken, or the model needs code of its own.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not is_hub_name(name):
            raise FileNotFoundError(f"`{argument}={name}` is no folder; give the folder of a saved model")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`{argument}={name}` is a LoRA adapter; merge it into its base first: "
            "`interpolate_adapters([adapter], [1.0], folder, base_model=base)`"
        )
    try:
        config = read_json(folder / "config.json")
        check_class(config, folder)
        for what, needed in {
            "config.json": needs_code(config),
            "tokenizer_config.json": tokenizer_needs_code(folder / "tokenizer_config.json"),
        }.items():
            if needed and not trust_remote_code:
                otherwise = ", or read that code and set `trust_remote_code`" if trust_remote_code is False else ""
                raise ValueError(
                    f"{folder} needs code of its own (`auto_map` in {what}), which is not run; use a model whose "
                    f"class is in transformers{otherwise}"
                )
        for file in weight_files(folder):
            open_safetensors(folder / file)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"`{argument}`: {error}") from error


def check_on_hub(where: str, name: str) -> None:
    """
    A name that is no folder must be a model's on the hub, or in its cache, whose configuration can be read.

    Raises:
        FileNotFoundError: If there is none.
    """
    import transformers

    try:
        transformers.PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{where}: {name} is no folder, and no model of that name could be had from the hub; correct the name, "
            "or train it first"
        ) from error


def is_hub_name(name: str | Path) -> bool:
    """Whether a name could be one of the hub, `name` or `owner/name`."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return True


def check_class(config: dict[str, Any], folder: Path) -> None:
    """Refuses a type or a class of models that transformers does not have, unless code for it lies in the folder."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("auto_map"):
        return  # `needs_code` decides
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder / 'config.json'} has `model_type={config.get('model_type')!r}`; {NO_SUCH}")
    for name in config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ValueError(f"{folder / 'config.json'} has `architectures` of {name!r}; {NO_SUCH}")


def needs_code(config: dict[str, Any]) -> bool:
    """Whether a configuration names code that lies beside it, and transformers has none of that type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architectures = config.get("architectures") or [""]
    known = config.get("model_type") in CONFIG_MAPPING and hasattr(transformers, str(architectures[0]))
    return bool(config.get("auto_map")) and not known


def tokenizer_needs_code(file: Path) -> bool:
    """Whether a tokenizer's configuration names code that lies beside it, and transformers has no such class."""
    import transformers

    config = read_json(file) if file.is_file() else {}
    return bool(config.get("auto_map")) and not hasattr(transformers, str(config.get("tokenizer_class")))


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """A model of the class that its configuration names: safetensors alone, and no code from its folder."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found = getattr(transformers, str((config.architectures or [""])[0]), None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    kind: Any = found if known else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **kwargs)


def check_adapter_folder(argument: str, folder: Path) -> None:
    """
    Look at the folder of a LoRA adapter before it is loaded.

    Raises:
        FileNotFoundError: If it lacks its configuration, or its weights in safetensors.
        ValueError: If a file is broken, or the adapter is of another kind.
    """
    try:
        if not (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} has no adapter_config.json; give the folder of a saved LoRA adapter")
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        if kind != "LORA":
            raise ValueError(f"{folder} is a {kind} adapter; only LoRA is supported")
        open_safetensors(folder / "adapter_model.safetensors")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"`{argument}`: {error}") from error
