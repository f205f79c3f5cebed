"""
Memory of training MusicGen on one GPU, computed from shapes; with a check of the computation on a CPU.

    python benchmarks/musicgen_memory.py            # the table, for facebook/musicgen-small, -medium and -large
    python benchmarks/musicgen_memory.py --check    # computed against measured, for one step of a small random model

Parameters are counted on the published architectures (no weights are loaded). The activations that a decoder layer
keeps for its backward pass are counted on one layer of the full width, by `saved_tensors_hooks`. The rest is
arithmetic (see `memory`): weights in float32 unless stated otherwise, autocast to bfloat16, AdamW with two float32
moments, gradient checkpointing. Not counted: the allocator's fragmentation, the CUDA context, the embedder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)
from transformers.models.musicgen.modeling_musicgen import MusicgenDecoderLayer

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.losses import LOGITS_PER_CHUNK
from trl_drcd.policies.musicgen import LORA_TARGETS

MIB = 2**20
# hidden size, layers, heads, feed-forward: config.json of facebook/musicgen-{small,medium,large}
PUBLISHED = {"small": (1024, 24, 16, 4096), "medium": (1536, 48, 24, 6144), "large": (2048, 48, 32, 8192)}
# Buffers of (rows, V) float32 that the chunked loss holds at one time: see trl_drcd/losses.py
LOGIT_BUFFERS = 4


def published(name: str) -> MusicgenConfig:
    """Architecture of a published checkpoint: t5-base, encodec_32khz, and a decoder of its own size."""
    hidden, layers, heads, ffn = PUBLISHED[name]
    text = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    audio = EncodecConfig(
        sampling_rate=32000, hidden_size=128, num_filters=64, upsampling_ratios=[8, 5, 4, 4], codebook_size=2048,
        target_bandwidths=[2.2], use_causal_conv=False, use_conv_shortcut=False,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=ffn, vocab_size=2048
    )
    return MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)


def parameter_counts(config: MusicgenConfig, lora_rank: int | None) -> dict[str, int]:
    """Parameters: `total`, `decoder`, `trainable`, and `cached`, the trainable weights that autocast copies."""
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration(config)
    decoder = sum(p.numel() for p in model.decoder.parameters())
    linear = [m for m in model.decoder.modules() if isinstance(m, torch.nn.Linear)]
    trainable, cached = decoder, sum(m.weight.numel() for m in linear)
    if lora_rank:
        targets = [m for name, m in model.decoder.named_modules() if name.rpartition(".")[2] in LORA_TARGETS]
        trainable = cached = sum(lora_rank * (m.in_features + m.out_features) for m in targets)
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "decoder": decoder, "trainable": trainable, "cached": cached}


def saved_by_layer(config: MusicgenDecoderConfig, prompt: int, weight_dtype: torch.dtype) -> float:
    """Bytes per step and sequence that one decoder layer keeps for its backward pass, its weights left out."""
    steps = 64
    config._attn_implementation = "sdpa"
    layer = MusicgenDecoderLayer(config, layer_idx=0).to(weight_dtype)
    states = torch.randn(1, steps, config.hidden_size, dtype=weight_dtype, requires_grad=True)
    text = torch.randn(1, prompt, config.hidden_size, dtype=weight_dtype)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        shapes = {tuple(p.shape) for p in layer.parameters()} | {tuple(p.T.shape) for p in layer.parameters()}
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        layer(states, None, text, use_cache=False)
    return sum(kept.values()) / steps


def memory(
    config: MusicgenConfig, batch: int, steps: int, prompt: int, lora_rank: int | None, weight_bytes: int
) -> dict[str, float]:
    """
    Peak memory in MiB of one process, and its parts.

    Args:
        config (`MusicgenConfig`): The model's.
        batch (`int`): Sequences at one time (`per_device_train_batch_size`).
        steps (`int`): Decoder steps `S`.
        prompt (`int`): Tokens of a prompt.
        lora_rank (`int` or `None`): Rank of an adapter on every linear layer of the decoder; `None` trains all of it.
        weight_bytes (`int`): Bytes of a frozen or trained weight; an adapter's are float32.
    """
    counts, decoder = parameter_counts(config, lora_rank), config.decoder
    layers, hidden = decoder.num_hidden_layers, decoder.hidden_size
    trained = 4 if lora_rank else weight_bytes
    weights = counts["total"] * weight_bytes + (counts["trainable"] * 4 if lora_rank else 0)
    teacher = 0 if lora_rank else counts["decoder"] * weight_bytes  # text encoder and codec are shared
    optimiser = counts["trainable"] * (trained + 2 * trained)  # gradient, two moments
    dtype = {2: torch.bfloat16, 4: torch.float32}[weight_bytes]
    residual = layers * batch * steps * hidden * weight_bytes  # what checkpointing keeps of each layer
    one_layer = batch * steps * saved_by_layer(decoder, prompt, dtype)
    copies = counts["cached"] * 2 if trained == 4 else 0
    rows = min(batch * steps, LOGITS_PER_CHUNK // decoder.vocab_size)
    logits = LOGIT_BUFFERS * rows * decoder.vocab_size * 4
    update = residual + one_layer + copies + logits
    cache = 2 * layers * batch * (steps + prompt) * hidden * 2  # keys and values, bfloat16
    rollout = cache + copies
    static = weights + teacher + optimiser
    parts = {
        "weights": weights, "teacher": teacher, "gradients and moments": optimiser, "update": update,
        "rollout": rollout, "peak": static + max(update, rollout),
    }  # fmt: skip
    return {name: value / MIB for name, value in parts.items()}


def table(batch: int, steps: int, prompt: int, rank: int) -> list[dict]:
    """One row per published model and way to train it."""
    rows = []
    for name in PUBLISHED:
        config = published(name)
        for way, lora_rank, weight_bytes in (
            ("full, float32", None, 4), (f"LoRA r={rank}, float32", rank, 4), (f"LoRA r={rank}, bfloat16", rank, 2),
        ):  # fmt: skip
            counts = parameter_counts(config, lora_rank)
            parts = memory(config, batch, steps, prompt, lora_rank, weight_bytes)
            rows.append(
                {"model": name, "way": way, "batch": batch, "steps": steps, "prompt": prompt}
                | {f"{k} (M)": round(counts[k] / 1e6, 1) for k in ("total", "decoder", "trainable")}
                | {f"{k} (MiB)": round(value) for k, value in parts.items()}
            )
    return rows


def sampling_cache(steps: int, prompt: int) -> list[dict]:
    """Keys and values of sampling in bfloat16, MiB; guidance doubles the batch."""
    return [
        {"model": name, "batch": batch, "guidance": guided}
        | {"cache (MiB)": round(2 * layers * batch * (1 + guided) * (steps + prompt) * hidden * 2 / MIB)}
        for name, (hidden, layers, *_) in PUBLISHED.items()
        for batch in (1, 8, 32)
        for guided in (False, True)
    ]


def check(lora_rank: int | None, output: str) -> dict[str, float]:
    """What an update of a small random model allocates above weights and optimiser, MiB: computed and measured."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer

    torch.manual_seed(0)
    batch, steps = 16, 203
    text = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    audio = EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1, target_bandwidths=[3.0])
    decoder = MusicgenDecoderConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, ffn_dim=2048)
    model = MusicgenForConditionalGeneration(MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder))
    config, prompt = model.config, 8
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    trainer = CFGDistillDiversityTrainer(
        model=model,
        args=CFGDistillDiversityConfig(
            output, per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_completion_length=steps,
            report_to="none", use_cpu=True, bf16=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(["a"] * prompt)] * 64}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=lora_rank, target_modules=LORA_TARGETS) if lora_rank else None,
    )  # fmt: skip
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "a " * prompt}] * batch)
    trainer.compute_loss(trainer.model, inputs).backward()  # gradients exist from here on
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.compute_loss(trainer.model, inputs).backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    computed = memory(config, batch, steps, prompt, lora_rank, 4)["update"]
    return {"computed (MiB)": round(computed, 1), "measured (MiB)": round(most / MIB, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with one measured step of a small model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=503, help="10 s at 50 steps a second, and 3 for the delays")
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/musicgen_memory.json"))
    args = parser.parse_args()
    if args.check:
        checked = {way: check(rank, "outputs/musicgen_memory") for way, rank in (("full", None), ("LoRA", args.rank))}
        print(markdown_table(checked))
        return
    rows, caches = table(args.batch, args.steps, args.prompt, args.rank), sampling_cache(args.steps, args.prompt)
    write_text(args.output, json.dumps({"training": rows, "sampling": caches}, indent=2) + "\n")
    print(markdown_table({f"{row.pop('model')}, {row.pop('way')}": row for row in rows}))
    print(markdown_table({f"{row['model']}, batch {row['batch']}, CFG {row['guidance']}": row for row in caches}))


if __name__ == "__main__":
    main()
