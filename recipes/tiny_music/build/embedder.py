"""
Train the music embedding model E on one half of the training tunes, with recipes/music/train_embedder.py, and measure it.

The two chunks of a rendered recording are its positives; half of what E hears has been through the codec.

    python recipes/tiny_music/build/embedder.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from listening import CODEC, Clips
from measure_embedder import telling_apart
from render import SAMPLING_RATE
from scores import HERE

sys.path.append(str(HERE.parent / "music"))

from train_embedder import Arguments, train

from trl_drcd.files import write_text
from trl_drcd.audio.codecs import SpectralCodec


class ChunkPairs:
    """The chunks of each recording, one after the other: the shortest recording that two chunks can be taken from."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips) // 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        first, second = self.clips.index[2 * index : 2 * index + 2]
        samples = np.concatenate([self.clips.audio[first], self.clips.audio[second]])
        return samples / np.float32(32768), SAMPLING_RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "embedder")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "outputs" / "tiny_music" / "embedder")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--recordings", type=int, default=2000, help="of the half, at most")
    parser.add_argument("--batch-recordings", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    clips = Clips("train", half=0, recordings=args.recordings)
    settings = Arguments(
        dataset=f"tiny music, {len(clips) // 2} recordings", output_dir=str(args.work), codec=str(CODEC), bf16=True,
        steps=args.steps, recordings_per_batch=args.batch_recordings, seed=args.seed,
        resume_from_checkpoint="auto",
    )  # fmt: skip
    embedder = train(ChunkPairs(clips), settings)
    embedder.save_pretrained(args.output)
    report = {
        "recordings": len(clips) // 2, "steps": args.steps, "seed": args.seed, "seconds": round(time.time() - started),
        "test": telling_apart(embedder, SpectralCodec.from_pretrained(CODEC)),
    }  # fmt: skip
    write_text(args.output / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
