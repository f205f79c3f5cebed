"""Write a full checkpoint: a base model with a LoRA adapter merged into its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trl_drcd.files import write_text
from trl_drcd.merging.checkpoints import with_dtype
from trl_drcd.merging.folders import load_config, reading
from trl_drcd.merging.lora import PREFIX, REASONS, Adapter, unusual
from trl_drcd.merging.safetensors_files import Checkpoint
from trl_drcd.validation.model_folders import load_model
from trl_drcd.validation.saved_files import read_json

# Options that are not linear, but whose merge into the base is exact (tested)
MERGEABLE = {"use_dora"}


def write_into_base(adapter: Path, parents: Sequence[tuple[Adapter, float]], base: Path, folder: Path) -> None:
    """
    Write the base with the adapter merged in, computed in float32 and rounded once to each tensor's data type.

    Raises:
        ValueError: If base and adapter do not match, or the base's weights cannot represent the adapter; the message
            says why.
    """
    config = load_config(base)
    with reading(base):
        model = load_model(base, dtype=torch.float32)
    _check_mergeable(parents, base)
    if getattr(config, "tie_word_embeddings", False):
        _check_tied_weights(model, parents, base)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        _check_all_found(adapted, parents)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT's own checks and shape errors are of many types
        raise ValueError(
            f"`base_model={base}` does not match the adapter {parents[0][0].folder} in shapes or modules; give the "
            f"base that the adapter was trained on ({type(error).__name__}: {last_line(error)})"
        ) from error
    stored, usual = Checkpoint(base), config.dtype or torch.float32
    known = set(stored.names)
    for tensors in (merged.named_parameters(), merged.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(stored.spec(name)[0] if name in known else usual)
    merged.save_pretrained(folder)  # which records the data type of the first parameter
    written = with_dtype(read_json(folder / "config.json"), str(usual).removeprefix("torch."))
    write_text(folder / "config.json", json.dumps(written, indent=2) + "\n")


def last_line(error: Exception) -> str:
    """The last line of a message, in which PyTorch names the mismatched tensor."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].strip()[:300]


def _check_mergeable(parents: Sequence[tuple[Adapter, float]], base: Path) -> None:
    """Refuse adapters that the base's weights cannot represent, or whose merge is not known to be exact."""
    for parent, _ in parents:
        if parent.config.layer_replication:
            raise ValueError(
                f"{parent.folder} has `layer_replication={parent.config.layer_replication}`: the copies share the "
                "base's weights, which cannot hold different changes. Keep the adapter separate: omit `base_model`"
            )
        if hit := sorted(unusual(parent.config).keys() - MERGEABLE):
            reason = REASONS.get(hit[0], "this option is not supported")
            raise ValueError(
                f"{parent.folder} has `{hit[0]}={getattr(parent.config, hit[0])}`: {reason}, and no exact merge into "
                "the base is known. Keep the adapter separate: omit `base_model`"
            )


def _check_tied_weights(model: PreTrainedModel, parents: Sequence[tuple[Adapter, float]], base: Path) -> None:
    """Refuse changes of a tied embedding or head: PEFT would add the change of one to the tensor shared by both."""
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [f"{PREFIX}{name}." for name, module in model.named_modules() if any(module is one for one in both)]
    changed = {key for parent, _ in parents for key in parent.factors}
    if not parents[0][0].config.ensure_weight_tying:  # otherwise a saved module and its copy stay tied
        changed |= {key for parent, _ in parents for key in parent.full if "token_adapter" not in key}
    if hit := sorted(key for key in changed if f"{key}.".startswith(tuple(names))):
        raise ValueError(
            f"{base} ties its embedding and its head, and the adapter changes one of them ({hit[0]}): the merge would "
            "change both. Keep the adapter separate: omit `base_model`"
        )


def _check_all_found(adapted: PeftModel, parents: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse a base that lacks a module of the adapter: PEFT ignores such tensors with only a warning."""
    have = {name for name, _ in adapted.named_modules()}
    if lacking := sorted({module for parent, _ in parents for module in parent.factors} - have):
        raise ValueError(f"the base has no module {lacking[0].removeprefix(PREFIX)}")
    biases = {key for parent, _ in parents for key in parent.full if key.endswith(".bias")}
    own = {_plain(name) for name, _ in adapted.named_parameters()}
    if lacking := sorted(key for key in biases if _plain(key) not in own):
        raise ValueError(f"the base has no {lacking[0].removeprefix(PREFIX)}")


def _plain(name: str) -> str:
    """The name of a parameter without what PEFT adds to it."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
