"""
Train the preference model: which of two pieces of audio sounds better, from pairs whose better side is known.

Bradley-Terry on three kinds of pairs, of the judges' half of the tunes:

- a recording, and the same degraded: noise, clipping, wobbling pitch, gaps, or a second recording played over it;
- what the codec makes of a recording's tokens, and of the same with a share of the tokens replaced;
- what the codec makes of a recording's tokens, and what the base model sampled, without guidance, for its caption.

Samples with guidance are never among them, so what it says of guidance was not put in. It is an honest stand-in for a
score learned from listeners, and knows no more of music than these pairs hold.

    python recipes/tiny_music/build/train_preference.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from captions import caption
from listening import CODEC, Clips, log_mel_of, log_mel_statistics
from render import SAMPLES, SAMPLING_RATE
from scores import HERE
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_drcd.files import write_text
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio.judges import PreferenceModel, bradley_terry_loss
from trl_drcd.evaluation.statistics import bootstrap_interval
from trl_drcd.evaluation.sampling import sample_prompts

DEGRADATIONS = ("noise", "clipping", "wobble", "gaps", "overlay")


def degraded(waveforms: torch.Tensor, others: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """
    Waveforms `(b, T)` made worse.

    Args:
        waveforms (`torch.Tensor`): Shape `(b, T)`.
        others (`torch.Tensor`): Other recordings, same shape, for `"overlay"`.
        kind (`str`): One of `DEGRADATIONS`.
        generator (`torch.Generator`): Of all draws.
    """
    batch, length = waveforms.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, 1, generator=generator)

    rms = waveforms.square().mean(1, keepdim=True).sqrt()
    if kind == "noise":
        return waveforms + rms * 10 ** (-uniform(0, 20) / 20) * torch.randn(batch, length, generator=generator)
    if kind == "clipping":
        limit = rms * uniform(0.3, 1.0)
        return waveforms.clamp(-limit, limit)
    if kind == "wobble":
        time = torch.arange(length) / SAMPLING_RATE
        rate, depth = uniform(3, 8), uniform(0.004, 0.012)  # Hz; s: the pitch swings by 2 pi rate depth
        position = (time + depth / rate * torch.sin(2 * torch.pi * rate * time)) * SAMPLING_RATE
        left = position.long().clamp(0, length - 2)
        weight = (position - left).clamp(0, 1)
        return torch.lerp(waveforms.gather(1, left), waveforms.gather(1, left + 1), weight)
    if kind == "gaps":
        slots = torch.rand(batch, 40, generator=generator) < uniform(0.1, 0.4)
        return waveforms.masked_fill(slots.repeat_interleave(-(-length // 40), 1)[:, :length], 0.0)
    if kind == "overlay":
        level = rms / others.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        return waveforms + level * uniform(0.4, 1.0) * others
    raise ValueError(f"`kind` must be one of {DEGRADATIONS}, got {kind!r}")


def corrupted(codes: torch.Tensor, others: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Codes `(b, S, K)` with 10-60 % of the steps taken from other recordings' codes of the same shape, shuffled."""
    share = 0.1 + 0.5 * torch.rand(len(codes), 1, generator=generator)
    replaced = torch.rand(codes.shape[:2], generator=generator) < share
    shuffled = others[:, torch.randperm(codes.shape[1], generator=generator)]
    return torch.where(replaced[..., None], shuffled, codes)


def base_samples(clips: Clips, codec: SpectralCodec, seed: int) -> torch.Tensor:
    """What the shipped base samples for a caption of each clip, without guidance, as waveforms `(N, SAMPLES)`."""
    folder, rng = HERE / "models" / "musiclm", random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [caption(row, rng) for row in clips.rows]
    samples = sample_prompts(
        model,
        AutoTokenizer.from_pretrained(folder),
        prompts,
        max_new_tokens=200,
        seed=seed,
        description="base samples",
    )
    rows = []
    for start in range(0, len(prompts), 8):
        for waveform, _ in codec.decode(samples.token_ids[start : start + 8]):
            rows.append(torch.nn.functional.pad(waveform[:SAMPLES], (0, max(0, SAMPLES - len(waveform)))))
    return torch.stack(rows)


def pairs_of(clips: Clips, codec: SpectralCodec, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Better and worse waveforms, `(N, SAMPLES)` each, of every kind of pair; one pair of each kind for each clip."""
    generator = torch.Generator().manual_seed(seed)
    original, coded = (torch.cat(list(clips.waveforms(c))) for c in (None, codec))
    codes = torch.from_numpy(clips.codes[clips.index].astype("int64"))
    half = len(clips) // 2  # clips of another recording
    pairs = {kind: (original, degraded(original, original.roll(half, 0), kind, generator)) for kind in DEGRADATIONS}
    broken = corrupted(codes, codes.roll(half, 0), generator)
    parts = tqdm(broken.split(8), desc="corrupted tokens", unit="batch")
    pairs["corrupted tokens"] = coded, torch.cat([codec.decode_codes(part) for part in parts])
    pairs["base sample"] = coded, base_samples(clips, codec, seed)
    return pairs


def train(model: PreferenceModel, heard: dict[str, tuple], args: argparse.Namespace) -> list[float]:
    """Bradley-Terry training on log-mel windows of the pairs; each kind is drawn as often. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    kinds, losses = list(heard), []
    count = len(heard[kinds[0]][0])
    for _ in (bar := tqdm(range(args.steps), desc="preference", unit="step")):
        kind, index = torch.randint(len(kinds), (args.batch_size,)), torch.randint(count, (args.batch_size,))
        rows = [(kinds[k], i) for k, i in zip(kind.tolist(), index.tolist(), strict=True)]
        frames = torch.stack([heard[k][side][i] for side in (0, 1) for k, i in rows])
        with torch.autocast("cpu", torch.bfloat16):
            features = model.audio_features(frames.float(), torch.full((len(frames),), frames.shape[1]))
        better, worse = model.scores(features).chunk(2)
        loss = bradley_terry_loss(better, worse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def measure(model: PreferenceModel, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """How often the better side of held-out pairs is preferred, with intervals over clips."""
    result = {}
    for kind, (better, worse) in pairs.items():
        scores = [model.preference([(wave, SAMPLING_RATE) for wave in side]) for side in (better, worse)]
        result[kind] = bootstrap_interval((scores[0] > scores[1]).float().numpy())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "preference")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--recordings", type=int, default=600, help="of the half, at most")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()
    codec = SpectralCodec.from_pretrained(CODEC)
    clips, test = Clips("train", half=1, recordings=args.recordings), Clips("test", recordings=150)
    model = PreferenceModel(**log_mel_statistics(clips, PreferenceModel().log_mel))
    with torch.no_grad():
        heard = {
            kind: tuple(torch.cat([log_mel_of(part, model.log_mel) for part in side.split(64)]) for side in sides)
            for kind, sides in pairs_of(clips, codec, args.seed).items()
        }
    losses = train(model.train(), heard, args)
    model.eval().save_pretrained(args.output)
    report = {
        "recordings": len(clips) // 2, "steps": args.steps, "seed": args.seed,
        "loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": round(time.time() - started),
        "test_accuracy": measure(model, pairs_of(test, codec, args.seed + 1)),
    }  # fmt: skip
    write_text(args.output / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
