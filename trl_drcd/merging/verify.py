"""Check that a written folder is a model: load it and generate."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from trl_drcd.merging.folders import reading
from trl_drcd.validation.model_folders import load_model

# More than the codebooks of any MusicGen (8): with the delay pattern, its first complete frame takes that many steps
NEW_TOKENS = 16


@torch.no_grad()
def check_that_it_generates(folder: Path, adapter: Path | None = None, called: Path | None = None) -> None:
    """
    Load a checkpoint and sample a few tokens.

    Args:
        folder (`Path`): A full checkpoint.
        adapter (`Path`, *optional*): A LoRA adapter to load onto it; the generation config is then not checked.
        called (`Path`, *optional*): Name of the folder in messages, if it is still a staging folder.

    Raises:
        RuntimeError: If a weight is missing, unexpected or not finite, guidance is on, or the model generates nothing
            or audio that is not finite.
        ValueError: If the folder cannot be loaded at all.
    """
    name = called or folder
    with reading(name):
        model, info = load_model(folder, output_loading_info=True)
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
        raise RuntimeError(f"the weights in {name} do not match its model: {wrong}")
    if adapter is not None:
        with reading(adapter):
            model = PeftModel.from_pretrained(model, str(adapter))
    elif model.generation_config.guidance_scale not in (None, 1, 1.0):
        raise RuntimeError(f"{name} samples with guidance scale {model.generation_config.guidance_scale}; expected 1")
    if bad := [tensor for tensor, weights in model.named_parameters() if not weights.isfinite().all()]:
        raise RuntimeError(f"the model in {name} has NaN or infinite values in {bad[0]}; merge finite models")
    prompt = torch.tensor([[3, 4, 1]])
    with reading(name / "generation_config.json"):
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=True
        )
    audio = "audio" in model.output_modalities
    if not (output.shape[-1] > (0 if audio else prompt.shape[1]) and output.isfinite().all()):
        raise RuntimeError(f"the model in {name} loads, but generates no tokens or audio that is not finite")
