"""
Train the tiny MusicGen: T5 encoder, decoder with four heads over delayed codebooks, EnCodec of train_encodec.py.

The loss is the mean over codebooks and steps where codes stand. A caption is drawn anew each time a clip is seen, and
replaced by the null condition (no encoder states) with probability `--caption-dropout`. Text encoder and decoder train
together here; the EnCodec is finished. The schedule follows the clock, as in train_base.py.

    OMP_NUM_THREADS=1 python recipes/tiny_music/build/train_musicgen.py --minutes 32
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import caption
from render import OUTPUT, read_metadata
from tokenizer import build_t5_tokenizer
from tqdm import tqdm
from train_base import State, epoch_order, learning_rate
from train_encodec import NUM_CODEBOOKS
from transformers import (
    EncodecConfig,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

from trl_drcd.audio.codecs import delay
from trl_drcd.guidance import left_pad
from trl_drcd.policies import MusicgenPolicy


def build_musicgen(
    tokenizer: PreTrainedTokenizerFast, audio_encoder: EncodecConfig, num_codebooks: int = NUM_CODEBOOKS
) -> MusicgenForConditionalGeneration:
    """Random weights; 100 frames and the delays make 103 steps, sampled without guidance or truncation."""
    size = audio_encoder.codebook_size
    special = {"pad_token_id": size, "bos_token_id": size}
    text = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=size, hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4,
        num_codebooks=num_codebooks, max_position_embeddings=512, dropout=0.0, **special,
    )  # fmt: skip
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text, audio_encoder=audio_encoder, decoder=decoder)
    )
    model.generation_config = GenerationConfig(
        **special, decoder_start_token_id=size, do_sample=True, top_k=0, temperature=0.99, guidance_scale=1.0,
        max_length=100 + num_codebooks,
    )  # fmt: skip
    return model


class Batches:
    """Batches of one split, in the order the caller asks for."""

    def __init__(self, codes: Path, metadata: Path, policy: MusicgenPolicy):
        self.codes, self.policy = np.load(codes), policy
        self.rows = read_metadata(metadata)[: len(self.codes)]

    def batch(self, indices: list[int], rng: random.Random, dropout: float) -> tuple[torch.Tensor, ...]:
        """Prompt ids and mask `(B, P)`, completion ids and mask `(B, S * K)`, as the policy takes them."""
        rows: list[dict] = [
            {"prompt": "", "negative_prompt": None if rng.random() < dropout else caption(self.rows[i], rng)}
            for i in indices
        ]
        prompts = left_pad(self.policy.negative_prompt_ids(rows, None), 0)
        codes = torch.from_numpy(self.codes[indices].astype(np.int64))
        completion = delay(codes, self.policy.mask_id).flatten(1)
        return *prompts, completion, torch.ones_like(completion)


def code_loss(policy: MusicgenPolicy, model: MusicgenForConditionalGeneration, batch: tuple) -> torch.Tensor:
    """Mean negative log-likelihood of each codebook, `(K,)`, nats per code."""
    batch = tuple(tensor.to(model.device) for tensor in batch)
    with torch.autocast(model.device.type, torch.bfloat16):
        hidden = policy.hidden_states(model, *batch)
        logits = [head(hidden) for head in model.decoder.lm_heads]
    ids, mask = policy.ids_and_mask(*batch[2:])
    return torch.stack(
        [F.cross_entropy(z[mask[..., k]].float(), ids[..., k][mask[..., k]]) for k, z in enumerate(logits)]
    )


@torch.no_grad()
def validation_loss(policy, model, data: Batches, count: int, dropout: float) -> torch.Tensor:
    """Loss of each codebook on `count` clips spread over the split, always with the same captions (or none)."""
    rng, losses = random.Random(0), []
    chosen = np.linspace(0, len(data.codes) - 1, min(count, len(data.codes))).round().astype(int).tolist()
    parts = [chosen[start : start + 64] for start in range(0, len(chosen), 64)]
    losses = [code_loss(policy, model.eval(), data.batch(part, rng, dropout)) * len(part) for part in parts]
    model.train()
    return torch.stack(losses).sum(0) / len(chosen)


def evaluate(policy, model, data: Batches, record: dict, args: argparse.Namespace) -> float:
    """Add the validation losses to a record, append it to the log, and return the one with captions."""
    with_caption, null = (validation_loss(policy, model, data, args.validation_clips, share) for share in (0.0, 1.0))
    record |= {
        "validation_loss": round(float(with_caption.mean()), 4), "validation_loss_null": round(float(null.mean()), 4),
        "validation_loss_codebooks": [round(float(loss), 4) for loss in with_caption],
    }  # fmt: skip
    with open(args.output / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")
    tqdm.write(json.dumps(record))
    return record["validation_loss"]


def train(args: argparse.Namespace) -> None:
    """Train until the clock says so, going on from `last/` where there is one."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_t5_tokenizer()
    model = build_musicgen(tokenizer, EncodecConfig.from_pretrained(args.encodec / "config.json")).to(device).train()
    policy = MusicgenPolicy(tokenizer, model.config)
    model.audio_encoder = None  # added at the end: nothing of it trains
    data, validation = (
        Batches(args.codes / split / "codes.npy", args.clips / split, policy) for split in ("train", "validation")
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    state = State(args.output / "last")
    state.load(model, optimiser)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(data.codes)} clips, {device}")

    size, limit, losses = args.batch, args.minutes * 60, []
    per_epoch = len(data.codes) // size
    began, evaluated = time.time() - state.seconds, state.seconds
    bar = tqdm(total=int(limit), initial=int(state.seconds), unit="s", desc="training")
    while state.seconds < limit:
        epoch, position = divmod(state.step, per_epoch)
        order = epoch_order(args.seed, epoch, len(data.codes))
        rng = random.Random(f"{args.seed}-{state.step}")
        batch = data.batch(order[position * size : (position + 1) * size], rng, args.caption_dropout)
        loss = code_loss(policy, model, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(state.seconds / limit, args.learning_rate)
        optimiser.step()
        state.step, state.seconds = state.step + 1, time.time() - began
        losses.append(loss.item())
        bar.set_postfix(step=state.step, loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
        bar.update(int(state.seconds) - bar.n)
        if state.seconds - evaluated > 60 * args.evaluate_minutes or state.seconds >= limit:
            evaluated = state.seconds
            record = {
                "step": state.step, "epoch": round(state.step / per_epoch, 3), "seconds": round(state.seconds, 1),
                "train_loss": round(float(np.mean(losses)), 4),
            }  # fmt: skip
            losses = []
            state.best = min(state.best, evaluate(policy, model, validation, record, args))
            state.seconds = time.time() - began
            state.save(model, optimiser)
    model.audio_encoder = EncodecModel.from_pretrained(args.encodec)
    save(model.cpu().eval(), policy, args.output / "model")


def save(model: MusicgenForConditionalGeneration, policy: MusicgenPolicy, folder: Path) -> None:
    """Write model, tokenizer, processor and generation settings; the folder is replaced as a whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    policy.tokenizer.save_pretrained(temporary)
    policy.save_extras(model, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codes", type=Path, default=OUTPUT.parent / "encodec", help="has SPLIT/codes.npy")
    parser.add_argument("--encodec", type=Path, default=OUTPUT.parent / "encodec" / "model")
    parser.add_argument("--output", type=Path, default=OUTPUT.parent / "musicgen")
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--caption-dropout", type=float, default=0.15)
    parser.add_argument("--evaluate-minutes", type=float, default=3.0)
    parser.add_argument("--validation-clips", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "model" / "config.json").exists():
        print(f"{args.output / 'model'} is trained: skipped")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
