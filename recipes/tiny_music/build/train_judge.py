"""
Train the text-adherence judge on the other half of the training tunes, and measure it on the test tunes.

Two towers after MuLan (https://huggingface.co/papers/2208.12415) and a contrastive loss between clips and captions,
plus a classification loss for each attribute. It shares neither tunes, seed nor architecture with the embedding model
E, and is never a reward.

    python recipes/tiny_music/build/train_judge.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from captions import INSTRUMENTS, KINDS, MODES, NAMED, TEMPI, caption, full_caption, vocabulary
from listening import CODEC, Clips, as_audio, bank, log_mel_statistics
from scores import HERE
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio import TextAudioJudge
from trl_drcd.evaluation.statistics import bootstrap_interval
from trl_drcd.evaluation.variety import per_prompt

LABELS = {"instrument": list(INSTRUMENTS), "tempo": list(TEMPI), "kind": list(KINDS), "mode": MODES}


def label_of(row: dict, name: str) -> str:
    """A metadata row's label: the mode is the second word of its key."""
    return row["key"].split()[1] if name == "mode" else row[name]


def random_captions(rows: list[dict], rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """A caption of each row, and the rows it fits: `(N, N)`, 1 where a row has all that the line's caption names."""
    captions, fits = [], []
    for row in rows:
        named = {name for name, share in NAMED.items() if rng.random() < share} or {"instrument"}
        captions.append(caption(row, rng, named))
        fits.append([float(all(row[name] == other[name] for name in named)) for other in rows])
    return captions, torch.tensor(fits)


def contrastive_loss(cosines: torch.Tensor, matches: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways, captions by clips `(N, N)`; all clips that a caption fits share its target."""
    logits = scale * cosines
    by_caption, by_clip = matches / matches.sum(1, keepdim=True), matches.T / matches.T.sum(1, keepdim=True)
    return (cross_entropy(logits, by_caption) + cross_entropy(logits.T, by_clip)) / 2


def train(judge: TextAudioJudge, heard: list[torch.Tensor], rows: list[dict], args: argparse.Namespace) -> list[float]:
    """Contrastive and classification training on all versions heard. Returns the losses."""
    optimizer = torch.optim.AdamW(judge.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    labels = {
        name: torch.tensor([values.index(label_of(row, name)) for row in rows]) for name, values in LABELS.items()
    }
    rng, losses = random.Random(args.seed), []
    progress = tqdm(range(args.steps), desc="judge")
    for step in progress:
        index = torch.randperm(len(rows))[: args.batch_size]
        version = torch.randint(len(heard), index.shape).tolist()
        frames = torch.stack([heard[v][i] for v, i in zip(version, index.tolist(), strict=True)])
        captions, matches = random_captions([rows[i] for i in index.tolist()], rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = judge.audio_features(frames.float(), torch.full(index.shape, frames.shape[1]))
        audio, text = judge.audio_embeddings(features), judge.text_embeddings(judge.word_tensor(captions))
        loss = contrastive_loss(text @ audio.T, matches, judge.log_scale.exp().clamp(max=100))
        loss = loss + sum(cross_entropy(head(features), labels[name][index]) for name, head in judge.heads.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
        if step % 50 == 49:
            progress.write(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}")
    return losses


def measure(judge: TextAudioJudge, codec: SpectralCodec | None, split: str, seed: int = 0, choices: int = 16) -> dict:
    """
    Held-out accuracy of the labels, and of choosing a clip's full caption among `choices` different ones, with
    intervals over recordings.
    """
    clips, rng = Clips(split), random.Random(seed)
    audio = [pair for batch in clips.waveforms(codec) for pair in as_audio(batch)]
    predicted = judge.classify(audio)
    right = {
        name: [label == label_of(row, name) for label, row in zip(predicted[name], clips.rows, strict=True)]
        for name in LABELS
    }
    captions = [full_caption(row) for row in clips.rows]
    distinct = sorted(set(captions))
    others = [rng.sample([text for text in distinct if text != own], choices - 1) for own in captions]
    offered = [text for own, line in zip(captions, others, strict=True) for text in [own, *line]]
    cosines = judge.embed_text(offered).view(len(audio), choices, -1) @ judge.embed_audio(audio)[..., None]
    right[f"caption_of_{choices}"] = (cosines[..., 0].argmax(1) == 0).tolist()
    # The two chunks of a recording are no independent draws
    return {name: bootstrap_interval(per_prompt(values, 2)) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "judge")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--recordings", type=int, default=5000, help="of the half, at most")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()
    codec, clips = SpectralCodec.from_pretrained(CODEC), Clips("train", half=1, recordings=args.recordings)
    statistics = log_mel_statistics(clips, TextAudioJudge(vocabulary(), LABELS).log_mel)
    judge = TextAudioJudge(vocabulary(), LABELS, **statistics)
    with torch.no_grad():
        heard = [bank(clips, judge.log_mel, None), bank(clips, judge.log_mel, codec)]
    losses = train(judge.train(), heard, clips.rows, args)
    judge.eval().save_pretrained(args.output)
    report = {
        "recordings": len(clips) // 2, "steps": args.steps, "seed": args.seed,
        "loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": round(time.time() - started),
        "test_originals": measure(judge, None, "test"), "test_round_trips": measure(judge, codec, "test"),
    }  # fmt: skip
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
