"""Folders of models: found, compared, completed with what a merge of weights leaves out, written in one piece."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from trl_drcd.files import local_name
from trl_drcd.validation.model_folders import check_model, is_hub_name

# What belongs to a model besides its weights. Each group is taken from one parent, so that it stays consistent.
SIDE_FILES = (
    ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
     "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    ("preprocessor_config.json", "processor_config.json"),
    ("generation_config.json",),
    ("codec",),
)  # fmt: skip
# Entries of a configuration in which models of one architecture may differ
NOT_ARCHITECTURE = {
    *("_name_or_path", "_commit_hash", "_attn_implementation", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "attention_dropout", "dropout", "activation_dropout", "layerdrop", "dropout_rate"),
}


def find_folder(model: str | Path, argument: str = "models") -> Path:
    """
    The folder of a model: a local path, or a hub name, of which a snapshot is fetched.

    Raises:
        FileNotFoundError: If it is a path, and there is nothing.
    """
    if Path(model).exists():
        return Path(model)
    if not is_hub_name(model):
        raise FileNotFoundError(
            f"`{argument}`: {model} does not exist; give the folder of a saved model, or a hub name"
        )
    return Path(snapshot_download(str(model)))


def check_list(argument: str, models: Any) -> None:
    """
    Refuse one name where a list of them is due.

    Raises:
        TypeError: If it is no list.
    """
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        raise TypeError(f"`{argument}` must be a list of folders or hub names, got {models!r}")


@contextmanager
def new_folder(output_dir: str | Path, parents: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """
    A temporary folder that becomes `output_dir` when the block ends well, and is removed when it does not.

    Args:
        output_dir (`str` or `Path`): The folder to write.
        parents (`Sequence[Path]`): Folders that must not be it.
        overwrite (`bool`): Whether a folder that is not empty may be replaced.

    Raises:
        FileExistsError: If there is something at `output_dir`, and `overwrite` is not set.
        ValueError: If `output_dir` is one of the parents, or holds one.
    """
    output = Path(output_dir)
    for parent in parents:
        if output.resolve() in (parent.resolve(), *parent.resolve().parents):
            raise ValueError(f"`output_dir={output}` holds the model {parent} that is merged; give another folder")
    if output.is_file():
        raise FileExistsError(f"`output_dir={output}` is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"`output_dir={output}` is not an empty folder; give another, or set `overwrite`")
    temporary, replaced = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            os.replace(output, replaced)
        os.replace(temporary, output)
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def check_same_family(folders: Sequence[Path]) -> None:
    """
    Compare configurations, vocabularies and codecs with those of the first model.

    Warns where the model cards name different base models: the weights of models that do not come from one
    initialisation have no meaningful average.

    Args:
        folders (`Sequence[Path]`): At least one model.

    Raises:
        FileNotFoundError: If a folder has no `config.json`.
        ValueError: If a folder is broken or needs code of its own, or configurations, vocabularies or codecs differ;
            the message says where.
    """
    for number, folder in enumerate(folders):
        check_model(f"models[{number}]", folder)
    first = folders[0]
    config, vocabulary = _flat(_config(first).to_dict()), _vocabulary(first)
    for other in folders[1:]:
        theirs = _flat(_config(other).to_dict())
        for key in sorted(config.keys() | theirs.keys()):
            if config.get(key) != theirs.get(key):
                raise ValueError(
                    f"the models have different architectures: `{key}` is {config.get(key)!r} in {first} and "
                    f"{theirs.get(key)!r} in {other}; give models of one architecture"
                )
        words = _vocabulary(other)
        if vocabulary is not None and words is not None and words != vocabulary:
            example = sorted(words.items() ^ vocabulary.items())[0][0]
            raise ValueError(
                f"the tokenizers of {first} and {other} have different vocabularies, as at {example!r}; "
                "give models of one tokenizer"
            )
        for name in ("codec/config.json", "codec/codec.safetensors"):
            pair = first / name, other / name
            if all(path.is_file() for path in pair) and not filecmp.cmp(*pair, shallow=False):
                raise ValueError(f"the codecs of {first} and {other} differ: {name}; give models of one codec")
    warn_of_different_bases(folders)


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration with dotted keys, without what is not architecture."""
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if key not in NOT_ARCHITECTURE:
            entries |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Tokens and their ids; `None` where there is no tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    return vocabulary


def load_card(file: Path) -> ModelCard:
    """
    A model card.

    Raises:
        ValueError: If what stands at its head is no YAML of plain values.
    """
    try:
        return ModelCard.load(file)
    except (yaml.YAMLError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{file} has a head that is no plain YAML ({cause}); mend the card, or remove it") from error


def recorded_base(folder: Path) -> str | None:
    """The base model that an adapter's configuration or a model card names; `None` if neither does, or several."""
    config, card = folder / "adapter_config.json", folder / "README.md"
    if config.is_file():
        base = json.loads(config.read_text()).get("base_model_name_or_path")
    else:
        base = load_card(card).data.get("base_model") if card.is_file() else None
    return base if isinstance(base, str) else None


def warn_of_different_bases(folders: Sequence[Path]) -> None:
    """
    Warn where the models record different base models, by the last part of their names.

    Weights that do not come from one initialisation have no meaningful average.
    """
    bases = {folder: local_name(base) for folder in folders if (base := recorded_base(folder))}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        warnings.warn(
            f"the models record different base models ({listed}); weights that do not come from one initialisation "
            "have no meaningful average",
            stacklevel=3,
        )


def copy_side_files(parents: Sequence[Path], folder: Path) -> None:
    """
    Copy tokenizer, processor, codec and generation config of the first parent that has them, guidance off.

    Args:
        parents (`Sequence[Path]`): The merged models, the one that comes first in doubt first.
        folder (`Path`): The merged model's; has a `config.json`.
    """
    for group in SIDE_FILES:
        donor = next((parent for parent in parents if any((parent / name).exists() for name in group)), None)
        for name in group if donor else ():
            source = donor / name  # type: ignore[operator]
            if source.is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copyfile(source, folder / name)
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    elif not (folder / "config.json").is_file():
        return  # an adapter's
    else:
        generation = GenerationConfig.from_model_config(_config(folder))
    generation.guidance_scale = 1.0  # guidance is in the weights; MusicGen's own default would apply it again
    generation.save_pretrained(folder)
