"""
Train the tiny MusicLM: a `LlamaForCausalLM` over `<s> caption words <audio> a0 b0 a1 b1 ... </s>`.

The loss is on the audio tokens and `</s>`. A caption is drawn anew each time a clip is seen, and replaced by the null
prompt with probability `--caption-dropout`. The learning rate follows the clock: the run ends after `--minutes`,
whatever the speed of the machine. The best checkpoint by validation loss is kept in `best/`; `last/` is for resuming.

    OMP_NUM_THREADS=1 python recipes/tiny_music/build/train_base.py --minutes 57
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import caption
from render import OUTPUT, read_metadata
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from scores import HERE
from tokenizer import build_tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_drcd.audio.codecs import SpectralCodec


class Clips:
    """Batches of token streams of one split, in the order the caller asks for."""

    def __init__(self, folder: Path, codec: SpectralCodec, tokenizer: PreTrainedTokenizerFast):
        codes = torch.from_numpy(np.load(folder / "codes.npy").astype(np.int64))
        offsets = torch.arange(codec.num_codebooks) * codec.codebook_size + codec.first_token_id
        self.audio = (codes + offsets).flatten(1)
        self.rows = read_metadata(folder)
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


def audio_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, lengths: torch.Tensor, audio_length: int = 201
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits `(B, audio_length, V)` of the tokens after the prompts, and these tokens `(B, audio_length)`.

    With the padding on the right, causal attention alone hides it: no mask, and attention takes its fast path.
    """
    targets = lengths[:, None] + torch.arange(audio_length, device=ids.device)
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        hidden = hidden.gather(1, (targets - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.lm_head(hidden)
    return logits.float(), ids.gather(1, targets)


def audio_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats per token."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def tokens_in_turn(codec: SpectralCodec, end: int, vocabulary: int, audio_length: int = 201) -> torch.Tensor:
    """Which tokens may stand where in a stream, bool `(audio_length, V)`: the codebooks in turn, `</s>` last."""
    ids = torch.arange(vocabulary)
    codebook = torch.where(ids < codec.first_token_id, -1, (ids - codec.first_token_id) // codec.codebook_size)
    allowed = codebook[None] == (torch.arange(audio_length) % codec.num_codebooks)[:, None]
    allowed[-1] = ids == end
    return allowed


def off_turn_penalty(logits: torch.Tensor, allowed: torch.Tensor, margin: float = 12.0) -> torch.Tensor:
    """
    Mean of `softplus(log sum exp(z off turn) - log sum exp(z in turn) + margin)`, in nats.

    The likelihood alone leaves a rest of probability on words, on `</s>` and on the other codebook, and guidance may
    multiply it: guided clips ended at once or slipped out of turn. Beyond the margin the penalty is silent.
    """
    off, on = logits.masked_fill(allowed, -torch.inf), logits.masked_fill(~allowed, -torch.inf)
    return F.softplus(off.logsumexp(-1) - on.logsumexp(-1) + margin).mean()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, clips: Clips, count: int, dropout: float) -> float:
    """Loss on `count` clips spread over the split, always with the same captions (or null prompts, at dropout 1)."""
    rng, losses = random.Random(0), []
    model.eval()
    chosen = np.linspace(0, len(clips.rows) - 1, min(count, len(clips.rows))).round().astype(int).tolist()
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        ids, lengths = clips.batch(part, rng, dropout)
        losses.append(
            float(audio_loss(*audio_logits(model, ids.to(model.device), lengths.to(model.device)))) * len(part)
        )
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

    def save(self, model: torch.nn.Module, optimiser: torch.optim.AdamW) -> None:
        temporary = self.folder.with_name("last.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(model, str(temporary / "model.safetensors"))
        moments = {
            f"{i}.{name}": value.clone()
            for i, entry in optimiser.state_dict()["state"].items()
            for name, value in entry.items()
        }
        save_file(moments, temporary / "optimiser.safetensors")
        (temporary / "state.json").write_text(
            json.dumps({"step": self.step, "seconds": self.seconds, "best": self.best})
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(temporary, self.folder)

    def load(self, model: torch.nn.Module, optimiser: torch.optim.AdamW) -> None:
        if not (self.folder / "state.json").exists():
            return
        self.__dict__.update(json.loads((self.folder / "state.json").read_text()))
        load_weights(model, str(self.folder / "model.safetensors"))
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


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, clips: int) -> list[int]:
    """The order in which an epoch visits the clips."""
    return random.Random(f"{seed}-{epoch}").sample(range(clips), clips)


def build_optimiser(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))


def evaluate(model: LlamaForCausalLM, clips: Clips, record: dict, args: argparse.Namespace) -> float:
    """Add the validation losses to a record, append it to the log, and return the one with captions."""
    with_caption, null = (validation_loss(model, clips, args.validation_clips, share) for share in (0.0, 1.0))
    record |= {"validation_loss": round(with_caption, 4), "validation_loss_null": round(null, 4)}
    with open(args.output / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")
    tqdm.write(json.dumps(record))
    return record["validation_loss"]


def train(args: argparse.Namespace) -> None:
    """Train until the clock says so, going on from `last/` where there is one."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpectralCodec.from_pretrained(args.codec)
    tokenizer = build_tokenizer(codec.num_codebooks, codec.codebook_size)
    clips, validation = (Clips(args.clips / split, codec, tokenizer) for split in ("train", "validation"))
    model = build_model(tokenizer, args).to(device).train()
    optimiser = build_optimiser(model, args)
    allowed = tokens_in_turn(codec, tokenizer.eos_token_id, len(tokenizer)).to(device)
    state = State(args.output / "last")
    state.load(model.model, optimiser)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(clips.rows)} clips, {device}")

    size, limit, losses = args.batch, args.minutes * 60, []
    per_epoch = len(clips.rows) // size
    began, evaluated = time.time() - state.seconds, state.seconds
    bar = tqdm(total=int(limit), initial=int(state.seconds), unit="s", desc="training")
    while state.seconds < limit:
        epoch, position = divmod(state.step, per_epoch)
        order = epoch_order(args.seed, epoch, len(clips.rows))
        rng = random.Random(f"{args.seed}-{state.step}")
        ids, lengths = clips.batch(order[position * size : (position + 1) * size], rng, args.caption_dropout)
        logits, tokens = audio_logits(model, ids.to(device), lengths.to(device))
        loss = audio_loss(logits, tokens)
        optimiser.zero_grad()
        (loss + args.off_turn_weight * off_turn_penalty(logits, allowed)).backward()
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
                "train_loss": round(float(np.mean(losses)), 4), "learning_rate": optimiser.param_groups[0]["lr"],
            }  # fmt: skip
            losses = []
            held_out = evaluate(model, validation, record, args)
            if held_out < state.best:
                state.best = held_out
                save_model(args.output / "best", model, tokenizer)
            state.seconds = time.time() - began
            state.save(model.model, optimiser)
    (args.output / "finished.json").write_text(json.dumps({"step": state.step, "best": state.best}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codec", type=Path, default=HERE / "models" / "codec")
    parser.add_argument("--output", type=Path, default=OUTPUT.parent / "base")
    parser.add_argument("--minutes", type=float, default=57.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--caption-dropout", type=float, default=0.15)
    parser.add_argument(
        "--off-turn-weight", type=float, default=0.1, help="weight of the penalty on tokens out of turn"
    )
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
