"""
Train the tiny MusicLM: a `LlamaForCausalLM` over `<s> caption words <audio> a0 b0 a1 b1 ... </s>`.

The loss is on the audio tokens and `</s>`. A caption is drawn anew each time a clip is seen, and replaced by the null prompt
with probability `--caption-dropout`. The learning rate follows the clock: the run ends after `--minutes`, whatever the
speed of the machine. The best checkpoint by validation loss is kept in `best/`; `last/` is for resuming.

    OMP_NUM_THREADS=1 python recipes/tiny_music/train_base.py --minutes 55
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import caption
from render import OUTPUT
from safetensors.torch import load_file, save_file
from scores import HERE
from tokenizer import build_tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_drcd.codecs import SpectralCodec


class Clips:
    """Batches of token streams of one split, in the order the caller asks for."""

    def __init__(self, folder: Path, codec: SpectralCodec, tokenizer: PreTrainedTokenizerFast):
        codes = torch.from_numpy(np.load(folder / "codes.npy").astype(np.int64))
        offsets = torch.arange(codec.num_codebooks) * codec.codebook_size + codec.first_token_id
        self.audio = (codes + offsets).flatten(1)
        self.rows = [json.loads(line) for line in open(folder / "metadata.jsonl")]
        self.tokenizer = tokenizer

    def batch(self, indices: list[int], rng: random.Random, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `input_ids (B, L)` and `lengths (B,)` of the prompts: prompt, audio tokens, `</s>`, padding on the right.

        A null prompt takes the place of a caption with probability `dropout`.
        """
        texts = ["" if rng.random() < dropout else caption(self.rows[i], rng) for i in indices]
        prompts = [torch.tensor(ids) for ids in self.tokenizer(texts)["input_ids"]]
        end = torch.tensor([self.tokenizer.eos_token_id])
        streams = [torch.cat([p, self.audio[i], end]) for p, i in zip(prompts, indices, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, torch.tensor([len(p) for p in prompts])


def audio_loss(model: LlamaForCausalLM, ids: torch.Tensor, lengths: torch.Tensor, audio_length: int = 201) -> torch.Tensor:
    """
    Mean negative log-likelihood, in nats per token, of the `audio_length` tokens after the prompts.

    With the padding on the right, causal attention alone hides it: no mask, and attention takes its fast path.
    """
    targets = lengths[:, None] + torch.arange(audio_length, device=ids.device)
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        hidden = hidden.gather(1, (targets - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), ids.gather(1, targets).flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, clips: Clips, count: int, dropout: float) -> float:
    """Loss on `count` clips spread over the split, always with the same captions (or null prompts, at dropout 1)."""
    rng, losses = random.Random(0), []
    model.eval()
    chosen = np.linspace(0, len(clips.rows) - 1, min(count, len(clips.rows))).round().astype(int).tolist()
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        ids, lengths = clips.batch(part, rng, dropout)
        losses.append(float(audio_loss(model, ids.to(model.device), lengths.to(model.device))) * len(part))
    model.train()
    return sum(losses) / len(chosen)


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write model, tokenizer and generation settings; the folder is replaced as a whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.99, top_k=0, top_p=1.0, max_new_tokens=200,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def learning_rate(progress: float, peak: float, warmup: float = 0.02, last: float = 0.02) -> float:
    """Linear warm-up, then a cosine from `peak` to `last * peak`; `progress` in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    share = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * share)))


class State:
    """What resuming needs beside the weights: step, seconds trained, best validation loss, optimiser moments."""

    def __init__(self, folder: Path):
        self.folder, self.step, self.seconds, self.best = folder, 0, 0.0, math.inf

    def save(self, model: LlamaForCausalLM, optimiser: torch.optim.AdamW) -> None:
        temporary = self.folder.with_name("last.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.model.state_dict().items()}, temporary / "model.safetensors")
        moments = {
            f"{i}.{name}": value.clone()
            for i, entry in optimiser.state_dict()["state"].items()
            for name, value in entry.items()
        }
        save_file(moments, temporary / "optimiser.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds, "best": self.best}))
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(temporary, self.folder)

    def load(self, model: LlamaForCausalLM, optimiser: torch.optim.AdamW) -> None:
        if not (self.folder / "state.json").exists():
            return
        self.__dict__.update(json.loads((self.folder / "state.json").read_text()))
        model.model.load_state_dict(load_file(self.folder / "model.safetensors"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(self.folder / "optimiser.safetensors").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights for this tokenizer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.heads,
            max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpectralCodec.from_pretrained(args.codec)
    tokenizer = build_tokenizer(codec.num_codebooks, codec.codebook_size)
    data = {split: Clips(args.clips / split, codec, tokenizer) for split in ("train", "validation")}
    model = build_model(tokenizer, args).to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    state = State(args.output / "last")
    state.load(model, optimiser)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(data['train'].rows)} clips, {device}")

    size, limit = args.batch, args.minutes * 60
    per_epoch = len(data["train"].rows) // size
    order: list[int] = []
    running, began = [], time.time() - state.seconds
    last_evaluation = state.seconds
    bar = tqdm(total=int(limit), initial=int(state.seconds), unit="s", desc="training")
    while state.seconds < limit:
        epoch, position = divmod(state.step, per_epoch)
        if not order or position == 0:
            order = random.Random(f"{args.seed}-{epoch}").sample(range(len(data["train"].rows)), len(data["train"].rows))
        rng = random.Random(f"{args.seed}-{state.step}")
        ids, lengths = data["train"].batch(order[position * size : (position + 1) * size], rng, args.caption_dropout)
        loss = audio_loss(model, ids.to(device), lengths.to(device))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(state.seconds / limit, args.learning_rate)
        optimiser.step()
        state.step += 1
        running.append(loss.item())
        state.seconds = time.time() - began
        bar.set_postfix(step=state.step, loss=f"{np.mean(running[-50:]):.3f}", refresh=False)
        bar.update(int(state.seconds) - bar.n)
        if state.seconds - last_evaluation > 60 * args.evaluate_minutes or state.seconds >= limit:
            last_evaluation = state.seconds
            record = {
                "step": state.step, "epoch": round(state.step / per_epoch, 3), "seconds": round(state.seconds, 1),
                "train_loss": round(float(np.mean(running)), 4),
                "validation_loss": round(validation_loss(model, data["validation"], args.validation_clips, 0.0), 4),
                "validation_loss_null": round(validation_loss(model, data["validation"], args.validation_clips, 1.0), 4),
                "learning_rate": optimiser.param_groups[0]["lr"],
            }  # fmt: skip
            running = []
            with open(args.output / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
            if record["validation_loss"] < state.best:
                state.best = record["validation_loss"]
                save_model(args.output / "best", model, tokenizer)
            state.seconds = time.time() - began
            state.save(model, optimiser)
    (args.output / "finished.json").write_text(json.dumps({"step": state.step, "best": state.best}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codec", type=Path, default=HERE / "models" / "codec")
    parser.add_argument("--output", type=Path, default=OUTPUT.parent / "base")
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--caption-dropout", type=float, default=0.15)
    parser.add_argument("--evaluate-minutes", type=float, default=3.0)
    parser.add_argument("--validation-clips", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "finished.json").exists():
        print(f"{args.output} is trained: skipped")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
