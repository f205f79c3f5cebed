"""
Statistics of held-out recordings in the judge's space, for the Fréchet distance of `trl-drcd evaluate`: seconds.

    python recipes/tiny_music/build/reference.py        # writes models/judge/reference.safetensors; after each new judge

The test recordings as they were rendered, never through the codec. The distance of what the codec makes of some of
them is printed: no model that uses the codec can be expected below it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from listening import CODEC, Clips, as_audio
from scores import HERE

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio import TextAudioJudge
from trl_drcd.evaluation.frechet import Reference, frechet_to_reference
from trl_drcd.evaluation.digests import content_digest
from trl_drcd.evaluation.tables import formatted


def main() -> None:
    """Writes the file and prints what the codec alone and the number of clips cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, default=HERE / "models" / "judge")
    parser.add_argument("--output", type=Path, help="reference.safetensors in the judge's folder if not given")
    args = parser.parse_args()
    judge, clips = TextAudioJudge.from_pretrained(args.judge), Clips("test")
    few, codec = Clips("test", recordings=128), SpectralCodec.from_pretrained(CODEC)
    original, coded = (
        torch.cat([judge.embed_audio(as_audio(batch)) for batch in batches]).numpy()
        for batches in (clips.waveforms(None), few.waveforms(codec))
    )
    reference = Reference.of(original, content_digest(args.judge))
    output = args.output or args.judge / "reference.safetensors"
    reference.save(output)
    through = frechet_to_reference(coded, 2, reference)  # the two chunks of a recording are no independent draws
    print(
        f"{output}: {len(original)} clips\nround trips of {len(coded)} through the codec: "
        f"{formatted(through['frechet'], 4)}, floor of as many: {formatted(through['frechet_floor'], 4)}"
    )


if __name__ == "__main__":
    main()
