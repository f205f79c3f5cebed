"""
Loss and gradient on this machine's device against the same computation in float64 on the CPU.

    python benchmarks/gpu/correctness.py

For a causal LM and a MusicGen, all weights and LoRA: a process computes the reference in float64 on the CPU and keeps
the rollout, the loss and the gradient; two others do the same in float32 and with bfloat16 autocast on the device.
Compared are the terms of each sequence (KL to the guided teacher, log p, entropy; largest relative difference) and the
gradient (relative length of the difference, and cosine). It fails where a difference is larger than `LIMITS`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    EncodecConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

from trl_drcd.distributed import frozen_copy
from trl_drcd.files import write_text
from trl_drcd.guidance import left_pad
from trl_drcd.markdown import markdown_table
from trl_drcd.objective import JointObjective
from trl_drcd.policies import policy_class
from trl_drcd.teacher import GuidedTeacher

# Relative: of the terms, of the gradient
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.1)}
CASES = {
    "llama, all weights": ("llama", False),
    "llama, LoRA": ("llama", True),
    "musicgen, all weights": ("musicgen", False),
    "musicgen, LoRA": ("musicgen", True),
}
ROWS, STEPS, GUIDANCE, TEMPERATURE = 4, 24, 3.0, 0.99
PROMPTS = [[4, 5, 6], [4, 7], [5, 6, 7, 8, 9], [9]]


def tokenizer() -> PreTrainedTokenizerFast:
    """A few words."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(97, 107))])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build(family: str, lora: bool) -> Any:
    """A small random model, the same for every call."""
    torch.manual_seed(0)
    if family == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
            )
        )
    else:
        text = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        audio = EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1, target_bandwidths=[3.0])
        decoder = MusicgenDecoderConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, ffn_dim=256)
        model = MusicgenForConditionalGeneration(
            MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
        )
    if lora:
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


def compute(family: str, lora: bool, precision: str, rollout: Path) -> dict[str, torch.Tensor]:
    """Terms and gradient, float64 on the CPU; the reference, which is first, writes the rollout."""
    reference = precision == "float64"
    accelerator = Accelerator(cpu=reference, mixed_precision="bf16" if precision == "bfloat16" else "no")
    model = build(family, lora).to(accelerator.device, torch.float64 if reference else torch.float32)
    base = model.get_base_model() if lora else model
    policy: Any = policy_class(base)(tokenizer(), base.config)
    policy.prepare(base)
    if family == "musicgen":
        base.generation_config.update(pad_token_id=policy.mask_id, decoder_start_token_id=policy.mask_id)
    teacher = GuidedTeacher(policy, None if lora else frozen_copy(model, accelerator), GUIDANCE, accelerator)
    if not lora:  # the student has learned something
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if reference:
        save_file(sampled(policy, model), rollout)
    batch = {name: tensor.to(accelerator.device) for name, tensor in load_file(rollout).items()}
    credit = batch.pop("credit").to(next(model.parameters()).dtype)
    negative = left_pad([[1]] * ROWS if family == "llama" else [[]] * ROWS, 0)
    negative_prompt = tuple(tensor.to(accelerator.device) for tensor in negative)
    batch |= teacher.stored(teacher.read(model, batch, negative_prompt, ROWS), model)
    objective = JointObjective(policy, teacher, TEMPERATURE, (0.2, 0.2))
    terms = objective.terms(model, model, batch)
    losses = objective.losses(terms, {"diversity": credit}, None)
    sum(loss.mean() for loss in losses.values()).backward()  # type: ignore[union-attr]
    gradient = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    log_p = terms.log_probs.sum((1, 2))
    return {
        "terms": torch.stack([terms.kl, log_p, terms.entropy]).detach().double().cpu(),
        "gradient": torch.cat(gradient),
    }


def sampled(policy: Any, model: Any) -> dict[str, torch.Tensor]:
    """Completions of the model, those of the first row cut short, and a credit for each."""
    ids, mask = left_pad(PROMPTS, 0)
    torch.manual_seed(2)
    rollout = policy.rollout(model, PROMPTS, temperature=TEMPERATURE, max_new_tokens=STEPS)
    completion = torch.tensor(rollout.completions())
    kept = torch.ones_like(completion)
    if policy.num_codebooks == 1:
        kept[0, STEPS // 2 :] = 0
    credit = torch.randn(ROWS, 1, 1)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "credit")
    return dict(zip(names, (ids, mask, completion, kept, credit), strict=True))


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative differences, and the cosine of the gradients."""
    terms = (found["terms"] - expected["terms"]).abs() / expected["terms"].abs().clamp(min=1e-3)
    a, b = found["gradient"], expected["gradient"]
    return {
        "terms": terms.max().item(),
        "gradient": ((a - b).norm() / b.norm()).item(),
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit status is 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # precision, folder
    args = parser.parse_args(argv)
    if args.one:
        precision, folder = args.one
        for name, (family, lora) in CASES.items():
            found = compute(family, lora, precision, Path(folder, f"{name} rollout"))
            save_file(found, Path(folder, f"{name} {precision}"))
        return 0
    rows: dict[str, dict[str, object]] = {}
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float64", *LIMITS):  # a process each: accelerate has one device and one precision
            subprocess.run([sys.executable, __file__, "--one", precision, folder], check=True)
        for name in CASES:
            expected = load_file(Path(folder, f"{name} float64"))
            for precision, limits in LIMITS.items():
                found = compare(load_file(Path(folder, f"{name} {precision}")), expected)
                good = found["terms"] <= limits[0] and found["gradient"] <= limits[1]
                passed &= good
                rows[f"{name}, {precision}"] = {**found, "within limits": "yes" if good else "no"}
    print(markdown_table(rows))
    if args.output:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        write_text(args.output, json.dumps({"device": device, "rows": rows}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
