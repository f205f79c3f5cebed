"""Find and read the folders of models, and copy the files of a merge other than weights."""

from __future__ import annotations

import filecmp
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from trl_drcd.files import local_name, own_file, write_text
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.model_folders import is_hub_name
from trl_drcd.validation.saved_files import INDEX, WEIGHTS, read_json

BASE = "base"
JSON = bool | int | float | str | list | dict | None
TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
CODEC = ("codec/config.json", "codec/codec.safetensors", "codec/README.md")
# Files of a model besides its weights. Each group is copied from one parent, so that it stays consistent
SIDE_FILES = (
    TOKENIZER,
    ("preprocessor_config.json", "processor_config.json"),
    ("generation_config.json",),
    CODEC,
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# All files that are fetched for a model or an adapter on the Hub
HUB_FILES = (
    *("config.json", WEIGHTS, INDEX, "model-*.safetensors", "README.md"),
    *ADAPTER_FILES,
    *(name for group in SIDE_FILES for name in group),
)


# ---------------------------------------------------------------- finding and reading


def check_list(argument: str, models: object) -> None:
    """
    Check that `models` is a list of names and not a single one.

    Raises:
        TypeError: If it is not a list.
    """
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        raise TypeError(f"`{argument}` must be a list of folders or Hub names, got {models!r}")


def find_folder(model: str | Path, argument: str = "models") -> Path:
    """
    The folder of a model: a local path, or the local copy of a model on the Hub, which is fetched.

    Raises:
        FileNotFoundError: If there is neither a folder nor a model on the Hub of that name.
    """
    if Path(model).exists():
        return Path(model)
    if not is_hub_name(model):
        raise FileNotFoundError(
            f"`{argument}`: {model} does not exist; give the folder of a saved model, or a Hub name"
        )
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(HUB_FILES)))
    except OSError as error:
        raise FileNotFoundError(
            f"`{argument}`: {model} is not a folder, and could not be fetched from the Hub "
            f"({_first_line(error)}); correct the name, or fetch the model first"
        ) from error


def find_models(models: Sequence[str | Path]) -> list[Path]:
    """
    The folders of full checkpoints; `"base"` stands for the base model that the others record.

    Raises:
        FileNotFoundError: If a model does not exist, or the others do not record one base.
    """
    folders = {
        number: find_folder(model, f"models[{number}]")
        for number, model in enumerate(models)
        if str(model) != BASE or Path(BASE).exists()
    }
    for number in set(range(len(models))) - folders.keys():
        recorded = {base for folder in folders.values() if (base := recorded_base(folder))}
        if len(recorded) != 1:
            raise FileNotFoundError(
                f"`models[{number}]={BASE}` stands for the base model that the others record, but they record "
                f"{sorted(recorded) or 'none'}; give its folder or Hub name"
            )
        folders[number] = find_folder(recorded.pop(), f"models[{number}]={BASE}")
    return [folders[number] for number in range(len(models))]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Turn any error of a library while it reads `path` into a `ValueError` that names the file.

    For broken or hand-made files, transformers, PEFT and tokenizers raise errors of many types.

    Raises:
        ValueError: In place of every error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in tokenizers is not an `Exception`
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {_first_line(error)}); copy or save it again"
        ) from error


def _first_line(error: BaseException, length: int = 200) -> str:
    """The message of an error in one line, truncated to `length` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def check_files(argument: str, folder: Path) -> None:
    """
    Check that no file is a link out of the folder, and that all JSON files can be parsed.

    Raises:
        ValueError: If one is or cannot; the message names it.
    """
    with prefix_errors(argument):
        for name in HUB_FILES:
            for path in folder.glob(name):
                file = own_file(folder, str(path.relative_to(folder)))
                if file is not None and file.suffix == ".json":
                    read_json(file)


def load_config(folder: Path) -> PreTrainedConfig:
    """
    Load the configuration of a model.

    Raises:
        ValueError: If transformers cannot read it.
    """
    with reading(folder / "config.json"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def load_vocabulary(folder: Path) -> dict[str, int] | None:
    """
    Load the vocabulary, token to id; `None` if there is no tokenizer.

    Raises:
        ValueError: If transformers cannot read it.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    with reading(folder / "tokenizer_config.json"):
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    return vocabulary


def load_card(file: Path) -> ModelCard:
    """
    Load a model card.

    Raises:
        ValueError: If its metadata is not plain YAML.
    """
    try:
        return ModelCard.load(file)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        cause = _first_line(error)
        raise ValueError(
            f"{file} has metadata that is not plain YAML ({cause}); fix the card, or remove it"
        ) from error


# ---------------------------------------------------------------- the base


def recorded_base(folder: Path) -> str | None:
    """The base model recorded in an adapter's configuration or a model card; `None` if there is none or several."""
    config, card = folder / "adapter_config.json", folder / "README.md"
    if config.is_file():
        base = read_json(config).get("base_model_name_or_path")
    else:
        base = load_card(card).data.get("base_model") if card.is_file() else None
    return base if isinstance(base, str) else None


def warn_of_other_base(adapter: Path, base: str | Path) -> None:
    """Warn if an adapter was trained on another base model than the one given, by the last part of their names."""
    recorded = recorded_base(adapter)
    if recorded is not None and not _may_be_the_same(recorded, str(base)):
        warnings.warn(
            f"the adapter {adapter} was trained on {recorded}, and is used on {base}: on another model its weights "
            "mean nothing, unless that is the same model under another name",
            stacklevel=3,
        )


def _may_be_the_same(one: str, other: str) -> bool:
    """Whether two names may be of one model: the same file system entry, or the same last part."""
    if one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve()):
        return True
    return bool({Path(one).name, _last_part(one)} & {Path(other).name, _last_part(other)})


def _last_part(name: str) -> str:
    """The last part of a name or path; of a snapshot in the Hub's cache, that of the model's name."""
    parts = Path(name).resolve().parts if Path(name).exists() else Path(name).parts
    in_cache = len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
    return parts[-3].rpartition("--")[2] if in_cache else parts[-1]


def warn_of_different_bases(folders: Sequence[Path]) -> None:
    """
    Warn if the models record different base models, compared by the last part of their names.

    Weights from different initialisations have no meaningful average.
    """
    bases = {folder: local_name(base) for folder in folders if (base := recorded_base(folder))}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        warnings.warn(
            f"the models record different base models ({listed}); weights from different initialisations have no "
            "meaningful average",
            stacklevel=3,
        )


# ---------------------------------------------------------------- side files


def check_same_codec(folders: Sequence[Path]) -> None:
    """
    Compare codecs with that of the first model.

    Raises:
        ValueError: If one differs.
    """
    first = folders[0]
    for other in folders[1:]:
        for name in CODEC[:2]:
            pair = first / name, other / name
            if all(path.is_file() for path in pair) and not filecmp.cmp(*pair, shallow=False):
                raise ValueError(
                    f"the codecs of {first} and {other} differ in {name}; give models with the same codec"
                )


def check_generation_config(folder: Path) -> None:
    """
    Read the generation config of a folder, if it has one.

    Raises:
        ValueError: If transformers cannot read it.
    """
    if (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json"):
            GenerationConfig.from_pretrained(folder)


def listed(folder: Path, names: Iterable[str]) -> list[str]:
    """Names of files in a folder; those that are patterns stand for the files that it has."""
    return [
        found
        for name in names
        for found in (sorted(f.relative_to(folder).as_posix() for f in folder.glob(name)) if "*" in name else [name])
    ]


def copy_side_files(parents: Sequence[Path], folder: Path, special_tokens: Mapping[str, JSON] | None = None) -> None:
    """
    Copy tokenizer, processor, codec and generation config of the first parent that has them, and turn guidance off.

    Only known files are copied. Other entries of the generation config are kept.

    Args:
        parents (`Sequence[Path]`): Folders of the parents, the preferred one first.
        folder (`Path`): Folder of the merged model.
        special_tokens (`Mapping`, *optional*): Ids for entries that the generation config does not set.

    Raises:
        ValueError: If a file is a link out of its folder, or broken.
    """
    for group in SIDE_FILES:
        having = (one for one in parents if any((one / name).is_file() for name in listed(one, group)))
        donor = next(having, None)
        for name in listed(donor, group) if donor else ():
            if (source := own_file(donor or folder, name)) is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, folder / name)
    file = folder / "generation_config.json"
    if not file.is_file():
        if not (folder / "config.json").is_file():
            return  # an adapter
        GenerationConfig.from_model_config(load_config(folder)).save_pretrained(folder)
    generation = read_json(file)
    generation |= {name: ids for name, ids in (special_tokens or {}).items() if generation.get(name) is None}
    generation["guidance_scale"] = 1.0  # guidance is in the weights; MusicGen's own default would apply it again
    write_text(file, json.dumps(generation, indent=2, sort_keys=True) + "\n")
