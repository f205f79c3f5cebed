"""LoRA adapters as they lie in files: what of them is linear, and their factors with the scaling in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from trl_drcd.validation.model_folders import check_adapter_folder

PREFIX = "base_model.model."
# Options under which the change of the weights is not `scaling * B @ A`, and why their products have no LERP
NOT_LINEAR = {
    "use_dora": "DoRA rescales the columns of the weights, which is not linear",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "activated LoRA depends on the tokens of the input",
    "arrow_config": "an Arrow router chooses among adapters for each token",
    "kasa_config": "KaSA changes the base weights too",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA is not supported here",
    "megatron_config": "Megatron layers are not supported here",
    "target_parameters": "adapters of bare parameters are not supported here",
}
# Initialisations that leave the base weights as they are
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
REMEDY = (
    "merge each adapter into the base first (`interpolate_adapters([adapter], [1.0], folder, base_model=base)`), then "
    "use `interpolate_checkpoints`"
)


def check_linear(config: LoraConfig, name: str) -> None:
    """
    Refuse adapters whose change of the weights is not linear in the products B·A.

    Args:
        config (`LoraConfig`): The adapter's.
        name (`str`): What it is called in the message.

    Raises:
        ValueError: With the reason, and what to do instead.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{name} is a {getattr(config, 'peft_type', type(config))} adapter; only LoRA is supported")
    for option, reason in NOT_LINEAR.items():
        if getattr(config, option, None):
            raise ValueError(f"{name} has `{option}={getattr(config, option)}`: {reason}; {REMEDY}")
    if config.init_lora_weights not in PLAIN_INITS:
        raise ValueError(
            f"{name} has `init_lora_weights={config.init_lora_weights!r}`, which changes the base weights too; "
            "save it with `path_initial_model_for_weight_conversion`, or " + REMEDY
        )


@dataclass
class Adapter:
    """
    An adapter in memory.

    Args:
        folder (`Path`): Where it comes from.
        config (`LoraConfig`): Its configuration.
        factors (`dict`): Module to `(A, B)`, shapes `(r, in)` and `(out, r)`, the scaling not applied. Embeddings too.
        biases (`dict`): Module to the bias of its B, shape `(out,)`, the scaling not applied.
        full (`dict`): Key to a tensor that takes the place of one of the base's: saved modules, embeddings, token
            rows, biases.
        embeddings (`set`): Modules whose factors are those of an embedding.
    """

    folder: Path
    config: LoraConfig
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)

    def scaling(self, module: str) -> float:
        """
        What multiplies B·A of a module: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, patterns looked up.

        Raises:
            ValueError: If the factors have not the rank that the configuration says.
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


def load_adapter(folder: Path, argument: str = "adapters") -> Adapter:
    """
    Read an adapter.

    Raises:
        FileNotFoundError: If the folder lacks `adapter_config.json` or `adapter_model.safetensors`.
        ValueError: If it is of a kind that has no exact interpolation, or a file is broken.
    """
    check_adapter_folder(argument, folder)
    config: Any = PeftConfig.from_pretrained(str(folder))
    adapter = Adapter(folder, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"`{argument}`: {key} of {folder} is NaN or infinite; give an adapter of finite weights")
        if key.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue  # with their A
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            partner = key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
            if partner not in tensors:
                raise ValueError(f"`{argument}`: {folder} has no {partner} beside {key}; copy or save it again")
            module = key.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            adapter.factors[module] = tensor, tensors[partner]
            if key.endswith("_A"):
                adapter.embeddings.add(module)
        elif key.endswith(".lora_B.bias"):
            adapter.biases[key.removesuffix(".lora_B.bias")] = tensor
        elif ".lora_" in key and "lora_magnitude_vector" not in key:
            raise ValueError(f"{key} of {folder} is of a kind that is not known here; {REMEDY}")
        else:
            adapter.full[key] = tensor
    return adapter
