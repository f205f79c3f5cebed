"""
Check that the models of a merge have the same architecture, vocabulary and codec.

The architecture is every entry of the configuration that affects shapes or computation. Other entries may differ:
training (dropout, initialisation, losses), sampling, labels, special tokens. The merged model takes them from the
first model; special tokens that the first model does not set come from the first model that does.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig

from trl_drcd.merging.folders import (
    JSON,
    check_files,
    check_generation_config,
    check_same_codec,
    load_config,
    load_vocabulary,
    warn_of_different_bases,
)
from trl_drcd.validation.model_folders import check_model
from trl_drcd.validation.saved_files import read_json

SPECIAL_TOKENS = {
    *("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
}
TOKENIZED_BY = ("normalizer", "pre_tokenizer", "model", "post_processor")  # of tokenizer.json
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # the plainest words for another model
NOT_ARCHITECTURE = {
    # origin and runtime
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version"),
    *("dtype", "torch_dtype", "torchscript"),
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "pretraining_tp"),
    *("chunk_size_feed_forward", "return_dict", "gradient_checkpointing"),
    # training
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout_prob", "drop_path_rate"),
    *("initializer_range", "initializer_factor", "initializer_std", "initializer_cutoff_factor", "init_std"),
    *("embed_init_std", "init_xavier_std", "aux_loss_coef", "router_aux_loss_coef", "router_z_loss_coef"),
    *("router_jitter_noise", "output_router_logits"),
    # labels, and the tokenizer's class
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    # sampling, also stored in older configurations
    *(set(GenerationConfig().to_dict()) - SPECIAL_TOKENS),
}
DROPOUT = re.compile(r"(?<!token_)(dropout(_rate|_p)?|pdrop|layerdrop)$")
# Families whose position ids start after the padding id
POSITIONS_FROM_PAD = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod", "data2vec-text"),
    *("trocr", "xglm"),
}


@dataclass(frozen=True)
class SpecialToken:
    """
    A special token in which the models differ.

    Args:
        key (`str`): Entry of `config.json`, dotted if nested.
        value (`int`, `list`): The id or ids of the merged model.
        donor (`Path`): The model that they come from: the first that sets them.
        others (`dict`): Values of the models that differ.
    """

    key: str
    value: JSON
    donor: Path
    others: dict[Path, JSON]

    def __str__(self) -> str:
        return f"`{self.key}` is {self.value}, from {self.donor.name}; {self.have()}"

    def have(self) -> str:
        """Values of the models that differ, in words."""
        values = {folder.name: "none" if value is None else value for folder, value in self.others.items()}
        return ", ".join(f"{name} has {value}" for name, value in values.items())


def check_same_family(folders: Sequence[Path]) -> list[SpecialToken]:
    """
    Compare configurations, vocabularies and codecs with those of the first model.

    Warns if the models record different base models (weights from different initialisations have no meaningful
    average), and if two models set different special tokens.

    Args:
        folders (`Sequence[Path]`): At least one model.

    Returns:
        `list[SpecialToken]`: The special tokens in which the models differ.

    Raises:
        FileNotFoundError: If a folder has no `config.json`.
        ValueError: If a file is broken or a link out of its folder, a model needs custom code, or architectures,
            vocabularies or codecs differ; the message says where.
    """
    for number, folder in enumerate(folders):
        check_files(f"models[{number}]", folder)
        check_model(f"models[{number}]", folder)
        for name in ("config.json", "generation_config.json"):
            check_special_tokens(folder / name)
        check_generation_config(folder)
    configs = {folder: flat(load_config(folder).to_dict()) for folder in folders}
    for folder in folders[1:]:
        check_same_architecture(folders[0], configs[folders[0]], folder, configs[folder])
    check_same_vocabulary(folders)
    check_same_codec(folders)
    warn_of_different_bases(folders)
    return special_tokens(configs)


def flat(config: Mapping[str, JSON], prefix: str = "") -> dict[str, JSON]:
    """Flatten a configuration to dotted keys, keeping only architecture and special tokens."""
    entries: dict[str, JSON] = {}
    for key, value in config.items():
        if key not in NOT_ARCHITECTURE and not DROPOUT.search(key):
            entries |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries


def is_special_token(key: str) -> bool:
    """Whether a dotted key of a configuration names a special token."""
    return key.rpartition(".")[2] in SPECIAL_TOKENS


def check_special_tokens(file: Path) -> None:
    """
    Check the special tokens in a JSON file, if it exists.

    Raises:
        ValueError: If one is neither a token id nor a list of token ids.
    """
    entries = flat(read_json(file)) if file.is_file() else {}
    for key, value in entries.items():
        ids = value if isinstance(value, list) else [value]
        if is_special_token(key) and value is not None and not (ids and all(map(_is_token_id, ids))):
            raise ValueError(f"{file} has `{key}={value!r}`; it must be a token id, or a list of them")


def _is_token_id(value: JSON) -> bool:
    """Whether a value may be a token id; older configurations use -1 for none."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31


def check_same_architecture(
    first: object, ours: Mapping[str, JSON], other: object, theirs: Mapping[str, JSON]
) -> None:
    """
    Compare the [`flat`] configurations of two models.

    Args:
        first, other: Their names in messages.
        ours, theirs (`Mapping`): Their configurations.

    Raises:
        ValueError: If an entry that affects shapes or computation differs.
    """
    positions = ours.get("model_type") in POSITIONS_FROM_PAD
    told_first = [key for key in SIZES if key in ours and key in theirs]
    for key in [*told_first, *sorted(ours.keys() | theirs.keys())]:
        decides = not is_special_token(key) or (positions and key == "pad_token_id")
        if decides and ours.get(key) != theirs.get(key):
            raise ValueError(
                f"the models have different architectures: `{key}` is {ours.get(key)!r} in {first} and "
                f"{theirs.get(key)!r} in {other}; give models of the same architecture"
            )


def check_same_vocabulary(folders: Sequence[Path]) -> None:
    """
    Compare the vocabularies of all models that have a tokenizer; warn if they split texts otherwise.

    Raises:
        ValueError: If two differ.
    """
    found = {folder: words for folder in folders if (words := load_vocabulary(folder)) is not None}
    for other, words in found.items():
        first, vocabulary = next(iter(found.items()))
        if words != vocabulary:
            example = sorted(words.items() ^ vocabulary.items())[0][0]
            raise ValueError(
                f"the tokenizers of {first} and {other} have different vocabularies, as at {example!r}; "
                "give models with the same tokenizer"
            )
    splits = {folder: _splits(folder / "tokenizer.json") for folder in found}
    for other, how in splits.items():
        first, own = next(iter(splits.items()))
        if differing := [key for key in TOKENIZED_BY if own and how and how.get(key) != own.get(key)]:
            warnings.warn(
                f"the tokenizers of {first} and {other} split texts otherwise (`{differing[0]}` of tokenizer.json): "
                "the same text has other ids; the merge gets the first's",
                stacklevel=4,
            )


def _splits(file: Path) -> dict[str, JSON]:
    """What of a tokenizer, beside its vocabulary, decides the ids of a text; empty if it cannot be read."""
    try:
        found = json.loads(Tokenizer.from_file(str(file)).to_str())  # files of other versions have other forms
    except Exception:  # `tokenizers` raises nothing else, also without a file
        return {}
    return {key: found.get(key) for key in TOKENIZED_BY} | {"model": {**(found.get("model") or {}), "vocab": None}}


def special_tokens(configs: Mapping[Path, Mapping[str, JSON]]) -> list[SpecialToken]:
    """The special tokens in which configurations differ; warns if two of them set different ids."""
    found = []
    for key in sorted({key for config in configs.values() for key in config if is_special_token(key)}):
        values = {folder: config.get(key) for folder, config in configs.items()}
        donor = next((folder for folder, value in values.items() if value is not None), None)
        others = {folder: value for folder, value in values.items() if donor and value != values[donor]}
        if donor and others:
            token = SpecialToken(key, values[donor], donor, others)
            found.append(token)
            if any(value is not None for value in others.values()):
                warnings.warn(f"the models have different special tokens: {token}", stacklevel=4)
    return found
