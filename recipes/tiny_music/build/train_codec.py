"""
Fit the spectral codec on the training clips, write the codes of all clips, and report it on the validation clips.

    python recipes/tiny_music/build/train_codec.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from render import OUTPUT
from scores import HERE
from tqdm import tqdm

from trl_drcd.audio.codecs import SpectralCodec, fit_codebooks


def waveforms(audio: np.ndarray, rows: slice | np.ndarray) -> torch.Tensor:
    """Rows of an int16 array as float32 in `[-1, 1]`."""
    return torch.from_numpy(audio[rows].astype(np.float32) / 32768)


def perplexity(codes: torch.Tensor, codebook_size: int) -> list[float]:
    """exp(entropy) of the use of each codebook; codes are `(B, S, K)`."""
    shares = [torch.bincount(c.flatten(), minlength=codebook_size) / c.numel() for c in codes.unbind(-1)]
    return [float(torch.special.entr(share).sum().exp()) for share in shares]


@torch.no_grad()
def report(codec: SpectralCodec, audio: torch.Tensor) -> dict:
    """Log-mel distances to the original, in nats (mean absolute), of the quantised spectrogram and of the waveform."""
    original = codec.log_mel(audio)
    codes = codec.quantise(original)
    coded = (codec.decode_log_mel(codes) - original).abs().mean()
    decoded = torch.cat([codec.log_mel(codec.decode_codes(part)) for part in codes[:200].split(50)])
    return {
        "codebook_size": codec.codebook_size, "quantised_nats": float(coded),
        "decoded_nats": float((decoded - original[:200]).abs().mean()),
        "silence_nats": float((original - np.log(codec.floor)).abs().mean()),
        "perplexity": perplexity(codes, codec.codebook_size),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "codec")
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--num-codebooks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=200_000, help="training frames for the k-means")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-codes", action="store_true", help="fit and report only")
    args = parser.parse_args()
    if not (args.output / "config.json").exists():
        audio = np.load(args.clips / "train" / "audio.npy", mmap_mode="r")
        rng = np.random.default_rng(args.seed)
        rows = np.sort(rng.choice(len(audio), min(len(audio), args.frames // 50), replace=False))
        empty = SpectralCodec(torch.zeros(1, 1, 96))
        parts = [
            empty.log_mel(waveforms(audio, part))
            for part in tqdm(np.array_split(rows, len(rows) // 100 + 1), desc="log-mel")
        ]
        frames = torch.cat(parts).flatten(0, 1)
        frames = frames[torch.from_numpy(rng.permutation(len(frames))[: args.frames])]
        codec = SpectralCodec(fit_codebooks(frames, args.num_codebooks, args.codebook_size, seed=args.seed))
        codec.save_pretrained(args.output)
        validation = np.load(args.clips / "validation" / "audio.npy", mmap_mode="r")
        measured = report(codec, waveforms(validation, slice(None)))
        (args.output / "report.json").write_text(json.dumps(measured, indent=2) + "\n")
        print(json.dumps(measured))
    if args.no_codes:
        return
    codec = SpectralCodec.from_pretrained(args.output)
    for split in ("train", "validation", "test"):
        path = args.clips / split / "codes.npy"
        if path.exists():
            print(f"{path} exists: skipped")
            continue
        audio = np.load(args.clips / split / "audio.npy", mmap_mode="r")
        starts = tqdm(range(0, len(audio), 200), desc=f"codes of {split}")
        codes = torch.cat([codec.encode(waveforms(audio, slice(i, i + 200))) for i in starts])
        np.save(path.with_suffix(".tmp.npy"), codes.numpy().astype(np.uint16))
        os.replace(path.with_suffix(".tmp.npy"), path)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
