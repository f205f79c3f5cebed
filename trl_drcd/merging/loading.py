"""
Load an adapter with its own generation config.

transformers and PEFT (`pipeline`, `PeftModel.from_pretrained`, `AutoModel.from_pretrained`) use the generation config
of the adapter's base model, never the one in the adapter's folder (`tests/merging/test_loading.py` fails when that
changes). A distilled MusicGen would then sample with its base's guidance, and a distilled text model greedily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from trl_drcd.merging.folders import check_files, find_folder, reading, recorded_base, warn_of_other_base
from trl_drcd.validation.model_folders import check_adapter_folder, check_model, load_model


def load_adapter_model(
    adapter: str | Path, base_model: str | Path | None = None, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """
    Load a LoRA adapter on its base model, with the adapter's generation config.

    Args:
        adapter (`str` or `Path`): Folder or Hub name of a LoRA adapter, as written by training or
            [`interpolate_adapters`].
        base_model (`str` or `Path`, *optional*): Folder or Hub name of the base model; by default the one that the
            adapter records.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether the adapter's weights require gradients.
        **kwargs: Passed to the base model's `from_pretrained`, such as `dtype` or `device_map`.

    Returns:
        `PeftModel`: For `generate`, for `pipeline(task, model=..., tokenizer=...)`, and for
        [`set_interpolation_weight`]. If the folder has no generation config, the base model's is kept.

    Raises:
        FileNotFoundError: If the adapter or its base model does not exist, or no base model is recorded or given.
        ValueError: If a file of either is broken or a link out of its folder, or they do not match.
    """
    folder = find_folder(adapter, "adapter")
    check_files("adapter", folder)
    check_adapter_folder("adapter", folder)
    recorded = base_model or recorded_base(folder)
    if recorded is None:
        raise FileNotFoundError(f"`adapter={adapter}` records no base model; give it as `base_model`")
    base = find_folder(recorded, "base_model")
    check_files("base_model", base)
    check_model("base_model", base)
    if base_model:
        warn_of_other_base(folder, base_model)
    with reading(base):
        model = load_model(base, **kwargs)
    if (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    with reading(folder):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
