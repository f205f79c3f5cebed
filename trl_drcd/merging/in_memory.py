"""Choose lambda at deployment: keep several ends in memory and set a model to any interpolation of them in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig

from trl_drcd.merging.architecture import check_same_architecture, flat
from trl_drcd.merging.blend import blend, check_weights, two_weights
from trl_drcd.merging.folders import find_folder, load_config
from trl_drcd.merging.lora import check_mixed_in_memory
from trl_drcd.merging.safetensors_files import Checkpoint

ENDS = "_interpolation_ends"


def set_interpolation_weight(model: Any, weight: float | Sequence[float]) -> None:
    """
    Set a model in memory to `(1 - lambda) * theta_q + lambda * theta_d`, Eq. (6) of
    https://huggingface.co/papers/2410.06084, in place.

    For a `PeftModel` with two LoRA adapters (`load_adapter`), theta_q is the first and theta_d the second; all are
    made active and frozen, and only their scalings change. With one adapter, theta_d is the base. For any other model,
    the ends are those given to [`hold_checkpoints`]. The result does not depend on earlier calls: 0 and 1 give the
    ends bit for bit. `save_pretrained` of an adapter ignores lambda; use `interpolate_adapters` to save.

    Args:
        model (`PeftModel` or `nn.Module`): The model, changed in place.
        weight (`float` or `Sequence[float]`): lambda in `[0, 1]`, or one weight per end, which sum to 1; of one
            adapter and the base, two.

    Raises:
        TypeError: If `weight` is not a number or a list of numbers.
        ValueError: If there are no ends, their number does not match the weights, lambda is out of range, or an
            adapter is merged into the base or is not linear in `B @ A`.
    """
    if hasattr(model, "peft_config") and not isinstance(model, PeftModel):
        raise ValueError("`model` has adapters by `load_adapter` of transformers; load them with `PeftModel`")
    if hasattr(model, "peft_config"):
        _set_adapters(model, weight)
    elif hasattr(model, ENDS):
        _set_tensors(model, weight)
    else:
        raise ValueError(
            "`model` has nothing to interpolate; load two LoRA adapters, or call `hold_checkpoints` first"
        )


def hold_checkpoints(model: torch.nn.Module, checkpoints: Sequence[str | Path | Mapping[str, torch.Tensor]]) -> None:
    """
    Attach the ends of an interpolation to a model, for [`set_interpolation_weight`]; its weights do not change.

    Each end takes the memory of one more model, on the model's device and in its data types.

    Args:
        model (`nn.Module`): A full model of the same architecture as the ends.
        checkpoints (`Sequence`): For each end the folder or Hub name of a safetensors checkpoint, or a state dict.

    Raises:
        FileNotFoundError: If a checkpoint does not exist.
        ValueError: If an end lacks a tensor of the model, or has one of another shape, or different integers; if its
            configuration is of another architecture, or it has different values of tensors that are tied in the model.
    """
    own = _own_tensors(model)
    ends = []
    for checkpoint in checkpoints:
        label = checkpoint if isinstance(checkpoint, str | Path) else "a state dict"
        source: Any = _read(checkpoint, model) if isinstance(checkpoint, str | Path) else checkpoint
        end = {}
        for names, tensor in own:
            name, *tied = [name for name in names if name in source] or [""]
            if other := next((other for other in tied if not torch.equal(source[other], source[name])), None):
                raise ValueError(f"{name} and {other} are one tensor in the model, but have two values in {label}")
            if not name or source[name].shape != tensor.shape:
                has = "no such tensor" if not name else f"the shape {tuple(source[name].shape)}"
                raise ValueError(f"the model has {names[0]} of shape {tuple(tensor.shape)}, {label} has {has}")
            if not tensor.is_floating_point() and not torch.equal(source[name].to(tensor.device), tensor):
                raise ValueError(
                    f"{name} of {label} differs from the model's, but is {tensor.dtype} and cannot be averaged"
                )
            end[names[0]] = source[name].detach().to(tensor.device, tensor.dtype, copy=True)
        ends.append(end)
    object.__setattr__(model, ENDS, ends)


def _read(checkpoint: str | Path, model: Any) -> Checkpoint:
    """The tensors of a checkpoint, whose architecture must be that of the model."""
    folder, config = find_folder(checkpoint), getattr(model, "config", None)
    if (
        isinstance(config, PreTrainedConfig)
        and (folder / "config.json").is_file()
        and not hasattr(config, "auto_map")  # of code from elsewhere, which is not run to read a configuration
    ):
        own, other = flat(config.to_dict()), flat(load_config(folder).to_dict())
        own["architectures"] = other.get("architectures")  # which a model has once it is saved
        check_same_architecture("the model in memory", own, checkpoint, other)
    return Checkpoint(folder)


def _own_tensors(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Every tensor of the state dict once, with all its names: tied tensors have several."""
    grouped: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        grouped.setdefault(id(tensor), ([], tensor.detach()))[0].append(name)
    return list(grouped.values())


def _set_tensors(model: torch.nn.Module, weight: float | Sequence[float]) -> None:
    ends = getattr(model, ENDS)
    weights = _weights_of(weight, len(ends))
    with torch.no_grad():
        for names, tensor in _own_tensors(model):
            if tensor.is_floating_point():
                blend([end[names[0]] for end in ends], weights, out=tensor)


def _set_adapters(model: Any, weight: float | Sequence[float]) -> None:
    names = list(model.peft_config)
    # The other end of a single adapter is the base
    weights = _weights_of(weight, max(2, len(names)))[: len(names)]
    for name, config in model.peft_config.items():
        check_mixed_in_memory(config, f"adapter {name!r}")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("`model` has an adapter merged into its weights; call `unmerge_adapter()` first")
    trained = any(p.requires_grad for layer in layers for p in layer.parameters())
    if list(model.active_adapters) != names or trained:
        model.base_model.set_adapter(names, inference_mode=True)
    for layer in layers:
        for name, share in zip(names, weights, strict=True):
            layer.set_scale(name, share)


def _weights_of(weight: float | Sequence[float], count: int) -> list[float]:
    """One weight per end, from lambda or a list."""
    if isinstance(weight, str):
        raise TypeError(f"`weight` must be a number, or a list of one per end, got {weight!r}")
    if not isinstance(weight, int | float):
        return check_weights(weight, count)
    if count != 2:
        raise ValueError(f"`weight={weight}` needs exactly two ends, but there are {count}; give {count} weights")
    return two_weights(weight)
