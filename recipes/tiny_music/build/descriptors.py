"""
Fit the untrained second embedding, descriptors of timbre, harmony and rhythm, to clips that E was not trained on.

All there is to fit are means and standard deviations.

    python recipes/tiny_music/build/descriptors.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from listening import CODEC, Clips, as_audio
from measure_embedder import telling_apart
from scores import HERE

from trl_drcd.files import write_text
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio import MusicDescriptors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "descriptors")
    parser.add_argument("--recordings", type=int, default=500, help="of the judges' half of the tunes, at most")
    args = parser.parse_args()
    codec, clips = SpectralCodec.from_pretrained(CODEC), Clips("train", half=1, recordings=args.recordings)
    # What it will be asked about has been through the codec
    audio = [pair for batch in clips.waveforms(codec) for pair in as_audio(batch)]
    embedder = MusicDescriptors().fit(audio)
    embedder.save_pretrained(args.output)
    report = {"recordings": len(clips) // 2, "test": telling_apart(embedder, codec)}
    write_text(args.output / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
