"""Proof that a written folder is a model: it is loaded and generates."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from trl_drcd.validation.model_folders import load_model

MUSICGEN = {"musicgen", "musicgen_melody"}


@torch.no_grad()
def check_that_it_generates(folder: Path, adapter: Path | None = None) -> None:
    """
    Load a checkpoint and sample a few tokens.

    Args:
        folder (`Path`): A full checkpoint.
        adapter (`Path`, *optional*): A LoRA adapter to load onto it; then the generation config may be any.

    Raises:
        RuntimeError: If a weight is missing, left over or not finite, or nothing comes out of it, or not finite audio.
    """
    model, info = load_model(folder, output_loading_info=True)
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
        raise RuntimeError(f"the model in {folder} does not load as it was saved: {wrong}")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    elif model.generation_config.guidance_scale not in (None, 1, 1.0):
        raise RuntimeError(f"{folder} samples with guidance {model.generation_config.guidance_scale}, expected 1")
    if bad := [name for name, weights in model.named_parameters() if not weights.isfinite().all()]:
        raise RuntimeError(f"the model in {folder} holds NaN or infinite values in {bad[0]}; merge finite models")
    prompt = torch.tensor([[3, 4, 1]])
    if model.config.model_type in MUSICGEN:
        # Not shorter than the delay of the codebooks, so that a whole frame comes out
        output = model.generate(
            input_ids=prompt, max_new_tokens=model.config.decoder.num_codebooks + 4, do_sample=True
        )
        good = output.shape[-1] > 0 and bool(torch.isfinite(output).all())
    else:
        output = model.generate(prompt, max_new_tokens=4, do_sample=True, attention_mask=torch.ones_like(prompt))
        good = output.shape[1] > prompt.shape[1]
    if not good:
        raise RuntimeError(f"the model in {folder} was loaded but generated nothing of use")
