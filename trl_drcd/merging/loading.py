"""
Load an adapter as it was saved: with its own generation config.

transformers and PEFT read the generation config of an adapter's base model, never that of the adapter's folder:
`pipeline`, `PeftModel.from_pretrained` and `AutoModel.from_pretrained` alike (`tests/merging/test_loading.py` says
when that changes). A distilled MusicGen then samples with the guidance of its base, a distilled text model greedily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from trl_drcd.merging.folders import check_files, find_folder, reading, recorded_base
from trl_drcd.validation.model_folders import check_adapter_folder, check_model, load_model


def load_adapter_model(
    adapter: str | Path, base_model: str | Path | None = None, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """
    The base model of a LoRA adapter with the adapter and the adapter's generation config.

    Args:
        adapter (`str` or `Path`): Folder or hub name of a LoRA adapter, such as a training or
            [`interpolate_adapters`] writes.
        base_model (`str` or `Path`, *optional*): Folder or hub name of the base model; by default the one that the
            adapter records.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether the adapter is to be trained further.
        **kwargs: For the base model's `from_pretrained`, such as `dtype` or `device_map`.

    Returns:
        `PeftModel`: For `generate`, for `pipeline(task, model=..., tokenizer=...)`, and for
        [`set_interpolation_weight`]. Where the folder has no generation config, it has the base model's.

    Raises:
        FileNotFoundError: If the adapter or its base model is not there.
        ValueError: If a file of either is broken or a link out of its folder, or they do not fit.
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
    with reading(base):
        model = load_model(base, **kwargs)
    if (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    with reading(folder):
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
