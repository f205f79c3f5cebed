"""Read LoRA adapters from files, and check that their effect is linear in the products `B @ A`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from trl_drcd.files import own_file
from trl_drcd.merging.folders import ADAPTER_FILES, check_files, reading
from trl_drcd.validation.model_folders import check_adapter_folder
from trl_drcd.validation.saved_files import read_json

PREFIX = "base_model.model."
# Configuration entries under which the change of the weights remains `scaling * B @ A`; `init_lora_weights`, with the
# configurations of initialisations, is checked separately
LINEAR = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication"),
    *("fan_in_fan_out", "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
# All other entries are refused; the reasons, if known
REASONS = {
    "use_dora": "DoRA rescales the columns of the weights, which is not linear",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "activated LoRA depends on the tokens of the input",
    "arrow_config": "an Arrow router chooses among adapters for each token",
    "kasa_config": "KaSA also changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA is not supported here",
    "megatron_config": "Megatron layers are not supported here",
    "target_parameters": "adapters of parameters outside modules are not supported here",
}
# Initialisations that do not change the base weights
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
REMEDY = (
    "merge each adapter into the base first (`interpolate_adapters([adapter], [1.0], folder, base_model=base)`), then "
    "use `interpolate_checkpoints`"
)


def check_linear(config: LoraConfig, name: str) -> None:
    """
    Check that an adapter's change of the weights is linear in the products B·A.

    Args:
        config (`LoraConfig`): Configuration of the adapter.
        name (`str`): Name of the adapter in messages.

    Raises:
        ValueError: If it is not; the message gives the reason and the remedy.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{name} is a {getattr(config, 'peft_type', type(config))} adapter; only LoRA is supported")
    for option, value in unusual(config).items():
        reason = REASONS.get(option, "this option is not supported")
        raise ValueError(f"{name} has `{option}={value}`: {reason}; {REMEDY}")
    if config.init_lora_weights not in PLAIN_INITS:
        raise ValueError(
            f"{name} has `init_lora_weights={config.init_lora_weights!r}`, which also changes the base weights; "
            "save it with `path_initial_model_for_weight_conversion`, or " + REMEDY
        )


def check_mixed_in_memory(config: LoraConfig, name: str) -> None:
    """
    Check that an adapter can be mixed with others, or the base, in memory.

    Args:
        config (`LoraConfig`): Configuration of the adapter.
        name (`str`): Name of the adapter in messages.

    Raises:
        ValueError: If its change of the weights is not linear, or it replaces tensors of the base.
    """
    check_linear(config, name)
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"{name} replaces tensors of the base, which PEFT can do for only one active adapter: "
            f"`bias={config.bias!r}`, `modules_to_save={config.modules_to_save}`, "
            f"`trainable_token_indices={config.trainable_token_indices}`; use `interpolate_adapters`"
        )


def unusual(config: LoraConfig) -> dict[str, object]:
    """Configuration entries outside [`LINEAR`] that differ from their defaults."""
    found = {}
    for entry in fields(config):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = getattr(config, entry.name)
        if entry.name not in LINEAR and value and value != default:
            found[entry.name] = value
    return found


@dataclass
class Adapter:
    """
    An adapter in memory.

    Args:
        folder (`Path`): Its folder.
        config (`LoraConfig`): Its configuration.
        factors (`dict`): Module, including embeddings, to `(A, B)`, shapes `(r, in)` and `(out, r)`, not scaled.
        biases (`dict`): Module to the bias of its B, shape `(out,)`, not scaled.
        full (`dict`): Key to a tensor that replaces one of the base: saved modules, embeddings, token rows, biases.
        embeddings (`set`): Modules that are embeddings.
    """

    folder: Path
    config: LoraConfig
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)

    def scaling(self, module: str) -> float:
        """
        Scaling of B·A of a module: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with rank and alpha patterns applied.

        Raises:
            ValueError: If the rank of the factors is not that of the configuration.
        """
        name = module.removeprefix(PREFIX)
        ranks, alphas = self.config.rank_pattern or {}, self.config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), name), self.config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), self.config.lora_alpha)
        if (found := self.factors[module][0].shape[0]) != rank:
            raise ValueError(
                f"{name} of {self.folder} has rank {found}; its adapter_config.json says {rank}; copy or save it again"
            )
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def nbytes(self) -> int:
        """Size of all tensors in float32, bytes."""
        tensors = [*(t for pair in self.factors.values() for t in pair), *self.biases.values(), *self.full.values()]
        return 4 * sum(tensor.numel() for tensor in tensors)


def load_adapter(folder: Path, argument: str = "adapters") -> Adapter:
    """
    Read an adapter.

    Raises:
        FileNotFoundError: If the folder lacks `adapter_config.json` or `adapter_model.safetensors`.
        ValueError: If it is not a LoRA adapter of finite floats, or a file is broken or a link out of the folder.
    """
    check_files(argument, folder)
    check_adapter_folder(argument, folder)
    adapter = Adapter(folder, load_adapter_config(folder, argument))
    file = own_file(folder, ADAPTER_FILES[1]) or folder / ADAPTER_FILES[1]
    with reading(file):
        tensors = load_file(file)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`{argument}`: {key} of {folder} is {tensor.dtype}; give a floating-point adapter")
        if not tensor.float().isfinite().all():
            raise ValueError(f"`{argument}`: {key} of {folder} has NaN or infinite values; give a finite adapter")
        _sort(adapter, key, tensors, argument)
    return adapter


def _sort(adapter: Adapter, key: str, tensors: Mapping[str, torch.Tensor], argument: str) -> None:
    """Add one tensor of the file to the field of `adapter` that its key belongs to."""
    if key.endswith((".lora_B.weight", ".lora_embedding_B")):
        partner = key.replace(".lora_B.", ".lora_A.").replace(".lora_embedding_B", ".lora_embedding_A")
        if partner not in tensors:
            raise ValueError(f"`{argument}`: {adapter.folder} has {key} but no {partner}; copy or save it again")
    elif key.endswith((".lora_A.weight", ".lora_embedding_A")):
        partner = key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        if partner not in tensors:
            raise ValueError(f"`{argument}`: {adapter.folder} has {key} but no {partner}; copy or save it again")
        module = key.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        a, b = tensors[key], tensors[partner]
        if a.ndim != b.ndim or a.ndim < 2 or a.shape[0] != b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(
                f"`{argument}`: A and B of {module} of {adapter.folder} have shapes {shapes}; expected (r, in) and "
                "(out, r)"
            )
        adapter.factors[module] = a, b
        if key.endswith("_A"):
            adapter.embeddings.add(module)
    elif key.endswith(".lora_B.bias"):
        adapter.biases[key.removesuffix(".lora_B.bias")] = tensors[key]
    elif ".lora_" in key and "lora_magnitude_vector" not in key:
        raise ValueError(f"{key} of {adapter.folder} is of an unknown kind; {REMEDY}")
    else:
        adapter.full[key] = tensors[key]


def load_adapter_config(folder: Path, argument: str = "adapters") -> LoraConfig:
    """
    Load the configuration of a LoRA adapter.

    Raises:
        ValueError: If it is broken, or has an entry that the installed PEFT does not know and would ignore.
    """
    file = folder / ADAPTER_FILES[0]
    raw = read_json(file)
    known = {entry.name for entry in fields(LoraConfig)}
    if unknown := sorted(name for name, value in raw.items() if name not in known and value):
        raise ValueError(
            f"`{argument}`: {file} has `{unknown[0]}={raw[unknown[0]]}`, which the installed peft does not know; "
            "install the version that wrote it"
        )
    for name in ("r", "lora_alpha"):
        if not _is_positive(raw.get(name, 8)):
            raise ValueError(f"`{argument}`: {file} has `{name}={raw[name]!r}`; it must be a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        if not _is_pattern(pattern := raw.get(name) or {}):
            raise ValueError(f"`{argument}`: {file} has `{name}={pattern!r}`; it must map patterns to numbers above 0")
    with reading(file):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`{argument}`: {folder} is a {config.peft_type} adapter; only LoRA is supported")
    return config


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(key) and _is_positive(value[key]) for key in value)
    except re.error:
        return False
