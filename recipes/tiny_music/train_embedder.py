"""
Train the music embedding model E on one half of the training tunes, and measure it on the test tunes.

After Appendix C.1 of https://huggingface.co/papers/2410.06084: two non-overlapping chunks of a recording are a
positive pair, chunks of other recordings are negatives, semi-hard triplet loss, noise, tempo and pitch changed at
random. What E hears in a rollout comes out of the codec, so half of what it is trained on does too.

    python recipes/tiny_music/train_embedder.py
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from listening import CODEC, Clips, as_audio, banks, log_mel_statistics
from scores import HERE
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from trl_drcd.codecs import SpectralCodec
from trl_drcd.embedders import MusicEmbedder


def same_recording_auc(first: torch.Tensor, second: torch.Tensor, others: torch.Tensor) -> float:
    """
    Area under the ROC curve of the cosine telling chunks of one recording from chunks of two.

    Args:
        first, second (`torch.Tensor`): Embeddings of length 1 of the two chunks of each recording, shape `(R, D)`.
        others (`torch.Tensor`): Which recordings are compared as negatives, shape `(R, R)`, bool, diagonal false.
    """
    cosines = first @ second.T
    scores = torch.cat([cosines.diagonal(), cosines[others]])
    labels = torch.cat([torch.ones(len(first)), torch.zeros(int(others.sum()))])
    return float(roc_auc_score(labels.numpy(), scores.numpy()))


def measure(embedder: MusicEmbedder, codec: SpectralCodec, split: str) -> dict:
    """Held-out areas under the ROC curve; `hard` ones compare recordings of one instrument and tempo only."""
    clips = Clips(split)
    original = torch.cat([embedder(as_audio(batch)) for batch in clips.waveforms(None)])
    coded = torch.cat([embedder(as_audio(batch)) for batch in clips.waveforms(codec)])
    rows = clips.rows[::2]
    other = torch.tensor([[a["recording"] != b["recording"] for b in rows] for a in rows])
    alike = [[a["instrument"] == b["instrument"] and a["tempo"] == b["tempo"] for b in rows] for a in rows]
    hard = other & torch.tensor(alike)
    pairs = {"originals": (original, original), "round_trips": (coded, coded), "mixed": (original, coded)}
    result = {name: same_recording_auc(a[::2], b[1::2], other) for name, (a, b) in pairs.items()}
    return result | {f"hard_{name}": same_recording_auc(a[::2], b[1::2], hard) for name, (a, b) in pairs.items()}


def train(
    embedder: MusicEmbedder, heard: list[tuple[torch.Tensor, torch.Tensor]], args: argparse.Namespace
) -> list[float]:
    """Semi-hard triplet training; rows are chunks, those of a recording neighbours. Returns the losses."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    miner, triplet_loss = TripletMarginMiner(args.margin, "semihard"), TripletMarginLoss(args.margin)
    optimizer = torch.optim.AdamW(embedder.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    recordings, patches, losses = len(heard[0][0]) // 2, len(embedder.positions), []
    labels = torch.arange(args.batch_recordings).repeat_interleave(2)
    progress = tqdm(range(args.steps), desc="embedder")
    for step in progress:
        chosen = torch.randperm(recordings)[: args.batch_recordings]
        index = torch.stack([2 * chosen, 2 * chosen + 1], 1).flatten()
        version = torch.randint(len(heard), index.shape)
        frames = torch.stack([heard[v][0][i] for v, i in zip(version.tolist(), index.tolist(), strict=True)])
        share = torch.stack([heard[v][1][i] for v, i in zip(version.tolist(), index.tolist(), strict=True)])
        # A third of the clips is cut short, so that short completions are no strangers.
        share = share * torch.where(torch.rand(share.shape) < 0.33, 0.25 + 0.75 * torch.rand(share.shape), 1.0)
        count = (share * patches).ceil().long().clamp(1, patches)
        with torch.autocast("cpu", torch.bfloat16):
            sums = embedder.encode(frames.float(), count)
        embeddings = embedder.project(sums.float() / count[:, None])
        loss = triplet_loss(embeddings, labels, miner(embeddings, labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(embedder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
        if step % 50 == 49:
            progress.write(f"step {step + 1}: triplet loss {sum(losses[-50:]) / 50:.4f}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "embedder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-recordings", type=int, default=256)
    parser.add_argument("--recordings", type=int, default=1500, help="of the half, at most")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--margin", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()
    codec, clips = SpectralCodec.from_pretrained(CODEC), Clips("train", half=0, recordings=args.recordings)
    embedder = MusicEmbedder(**log_mel_statistics(clips, MusicEmbedder().log_mel))
    with torch.no_grad():
        heard = banks(clips, embedder.log_mel, None, [None, 1]) + banks(clips, embedder.log_mel, codec, [None, 2])
    losses = train(embedder.train(), heard, args)
    embedder.eval().save_pretrained(args.output)
    report = {
        "recordings": len(clips) // 2, "steps": args.steps, "seed": args.seed, "margin": args.margin,
        "loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": round(time.time() - started),
        "test_auc": measure(embedder, codec, "test"),
    }  # fmt: skip
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
