"""Validate folders and Hub names of models before loading them. Code in a model's folder is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.saved_files import open_safetensors, read_json, weight_files

NO_SUCH = "the installed transformers has no such model; use another model, or install a version that has it"


def check_model(argument: str, name: str | Path, trust_remote_code: bool | None = None) -> None:
    """
    Check a local folder before a model is loaded from it. Hub names are left to transformers.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        name (`str` or `Path`): A folder, or a name on the Hub.
        trust_remote_code (`bool`, *optional*): Whether the model's own code may be run; `None` if the caller has no
            such option.

    Raises:
        FileNotFoundError: If the path does not exist, or has no model or no safetensors file.
        ValueError: If a file is broken, or the model needs its own code.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not is_hub_name(name):
            raise FileNotFoundError(f"`{argument}={name}` is not a folder; give the folder of a saved model")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`{argument}={name}` is a LoRA adapter; merge it into its base first: "
            "`interpolate_adapters([adapter], [1.0], folder, base_model=base)`"
        )
    with prefix_errors(argument):
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


def check_on_hub(where: str, name: str, revision: str | None = None, file: str = "config.json") -> dict[str, Any]:
    """
    Check that the configuration of a model can be read from the Hub or its cache.

    Args:
        where (`str`): The user's argument with its value, for error messages.
        name (`str`): Name of the model on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the model.
        file (`str`, *optional*, defaults to `"config.json"`): Name of the configuration's file.

    Returns:
        `dict`: The configuration.

    Raises:
        FileNotFoundError: If the configuration cannot be read.
    """
    import transformers

    try:
        return transformers.PreTrainedConfig.get_config_dict(name, revision=revision, _configuration_file=file)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{where}: {name} is not a folder, and not found on the Hub; correct the name, or train it first"
        ) from error


def is_hub_name(name: str | Path) -> bool:
    """Whether a name has the form of a Hub name, `name` or `owner/name`."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return True


def check_class(config: dict[str, Any], folder: Path) -> None:
    """Raise `ValueError` if transformers lacks the model type or class, unless the folder has code for it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.get("auto_map"):
        return  # `needs_code` decides
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder / 'config.json'} has `model_type={config.get('model_type')!r}`; {NO_SUCH}")
    registered = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[config["model_type"]], None)
    for name in config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if name == getattr(registered, "__name__", None):
            continue  # a class of the user's own
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ValueError(f"{folder / 'config.json'} has `architectures` of {name!r}; {NO_SUCH}")


def needs_code(config: dict[str, Any]) -> bool:
    """Whether a configuration refers to code in its folder and transformers lacks that model type or class."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architectures = config.get("architectures") or [""]
    known = config.get("model_type") in CONFIG_MAPPING and hasattr(transformers, str(architectures[0]))
    return bool(config.get("auto_map")) and not known


def tokenizer_needs_code(file: Path) -> bool:
    """Whether a tokenizer's configuration refers to code in its folder and transformers lacks that class."""
    import transformers

    config = read_json(file) if file.is_file() else {}
    return bool(config.get("auto_map")) and not hasattr(transformers, str(config.get("tokenizer_class")))


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """Load a model of the class named in its configuration, from safetensors only and without running its code."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found = getattr(transformers, str((config.architectures or [""])[0]), None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    kind: Any = found if known else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **kwargs)


def check_adapter_folder(argument: str, folder: Path) -> None:
    """
    Check the folder of a LoRA adapter before it is loaded.

    Args:
        argument (`str`): Name of the user's argument, for error messages.
        folder (`Path`): Folder of the adapter.

    Raises:
        FileNotFoundError: If it lacks `adapter_config.json` or `adapter_model.safetensors`.
        ValueError: If a file is broken, or the adapter is not LoRA.
    """
    with prefix_errors(argument):
        if not (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} has no adapter_config.json; give the folder of a saved LoRA adapter")
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        if kind != "LORA":
            raise ValueError(f"{folder} is a {kind} adapter; only LoRA is supported")
        open_safetensors(folder / "adapter_model.safetensors")
