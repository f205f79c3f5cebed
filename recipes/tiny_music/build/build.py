r"""
Build the tiny music world from nothing: scores, audio, codec, prompts, base model, embedding model, judges, gate.

Each step is a script of this folder that leaves out what exists already, so an interrupted build goes on where it was.
What a clone ships (the score list, the prompts, the models) exists: `--fresh` moves it to `outputs/` first.

    python recipes/tiny_music/build/build.py            # hours, most of it training; the README gives the steps' times

The embedding model and all judges alone, anew:

    python recipes/tiny_music/build/build.py \
        --steps embedder descriptors train_judge reference train_preference measure_embedder

All steps in little time, to see that they work (what comes out is no good; use a copy of the repository):

    python recipes/tiny_music/build/build.py --fresh --quick

The tiny MusicGen, which is not shipped, in an hour:

    python recipes/tiny_music/build/build.py --steps render train_encodec train_musicgen
    python recipes/tiny_music/build/build.py --steps render train_encodec train_musicgen --quick   # in minutes, and no good
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BUILD = Path(__file__).resolve().parent
HERE, ROOT = BUILD.parent, BUILD.parents[2]
# Step to the folder of models/ that it makes, where it makes one
STEPS = {
    "scores": None, "render": None, "train_codec": None, "prompts": None, "train_base": "musiclm", "export": None,
    "embedder": "embedder", "descriptors": "descriptors", "train_judge": "judge", "reference": None,
    "train_preference": "preference", "measure_embedder": None, "gate": None,
}  # fmt: skip
# Steps of the second family, run where they are asked for
MUSICGEN = ["train_encodec", "train_musicgen"]

QUICK = {
    "render": "--recordings 2000 100 300", "prompts": "--counts 300 60 30", "train_base": "--minutes 3",
    "export": "--count 50", "embedder": "--recordings 100 --steps 20 --batch-recordings 32",
    "descriptors": "--recordings 50", "train_judge": "--recordings 100 --steps 20",
    "train_preference": "--recordings 20 --steps 20",
    "train_encodec": "--minutes 1", "train_musicgen": "--minutes 1",
    "measure_embedder": "--recordings 10 --output outputs/tiny_music/quick",
    "gate": "--num-prompts 8 --output outputs/tiny_music/quick",
}  # fmt: skip


def run(step: str, arguments: list[str]) -> None:
    """Run a step's script and print how long it took; it sees the repository's `trl_drcd` and one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    began = time.time()
    print(f"== {step}", flush=True)
    subprocess.run([sys.executable, str(BUILD / f"{step}.py"), *arguments], check=True, env=environment, cwd=ROOT)
    print(f"== {step}: {time.time() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=[*STEPS, *MUSICGEN],
        help="only these, in this order, whether or not what they make exists",
    )
    parser.add_argument("--minutes", type=float, default=57.0, help="for the training of the base model")
    parser.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    parser.add_argument("--fresh", action="store_true", help="build again what is shipped")
    parser.add_argument(
        "--quick", action="store_true", help="every step in little time, to see that all of them work; no good models"
    )
    args = parser.parse_args()
    if args.fresh:
        kept = ROOT / "outputs" / f"tiny_music_{time.strftime('%Y%m%d-%H%M%S')}"
        for part in (HERE / "data", HERE / "models", ROOT / "outputs" / "tiny_music"):
            if part.exists():
                kept.mkdir(parents=True, exist_ok=True)
                shutil.move(part, kept / part.name)
        print(f"what was built before is now in {kept}")
    soundfont = ["--soundfont", args.soundfont]
    extra = {"render": soundfont, "measure_embedder": soundfont, "train_base": ["--minutes", str(args.minutes)]}
    if args.quick:
        for step, settings in QUICK.items():
            extra[step] = [*extra.get(step, []), *settings.split()]
    for step in args.steps or STEPS:
        model = STEPS.get(step)
        if not args.steps and model and (HERE / "models" / model / "report.json").exists():
            print(f"== {step}: models/{model} exists, skipped")
            continue
        run(step, extra.get(step, []))


if __name__ == "__main__":
    main()
