"""
Rows of results/music/results.jsonl drawn once more, on their first prompts and in float32, by `trl-drcd evaluate`.

    python tests/recipes/reproduction.py    # writes reproduction.json anew, where a change of the draws is meant

What is committed was measured in bfloat16, whose rounding differs between processors and turns draws; in float32 the
same seed gives the same tokens on nearly every one. So `reproduction.json` holds digests of float32 tokens.
Eight samples of a prompt tell one committed row from all others only by draws in common: with a decode loop that draws
otherwise, or another seed, the nearest row is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from trl_drcd import cli

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "music" / "results.jsonl"
RECORD = Path(__file__).with_name("reproduction.json")
NAMES = ("base", "beta 100")
PROMPTS = 16
# Not measured of a prompt, or a sum of others
LEFT_OUT = {"quality"}


def read_results(file: Path) -> list[dict]:
    """All lines of a results.jsonl."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def committed(name: str) -> dict:
    """The row of that name."""
    (row,) = (line for line in read_results(RESULTS) if line["name"] == name)
    return row


def draw(name: str, folder: Path) -> dict:
    """The row of that name, measured now: digests of its sequences, values of its prompts."""
    row = committed(name)
    words = {
        "num_prompts": PROMPTS, "samples_per_prompt": row["samples_per_prompt"], "seed": row["seed"],
        "batch_size": 64, "omega": row["omega"], "dtype": "float32",
        "output_dir": folder,
    }  # fmt: skip
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    with contextlib.chdir(ROOT):
        cli.main(["evaluate", "--config", "recipes/music/evaluate_music.yaml", "--only", name, *flags])
    (line,) = read_results(folder / "results.jsonl")
    (file,) = (folder / "samples").glob("*.safetensors")
    tokens = load_file(file)
    parts = tokens["ids"].split(tokens["lengths"].tolist())
    digests = [hashlib.sha256(part.numpy().astype("<i4").tobytes()).hexdigest()[:12] for part in parts]
    per_prompt = {metric: values for metric, values in line["per_prompt"].items() if metric not in LEFT_OUT}
    return {"sequences": digests, "per_prompt": per_prompt}


def main() -> None:
    """Writes the record."""
    record = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = draw(name, Path(folder))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{os.path.relpath(RECORD)}: {', '.join(record)}")


if __name__ == "__main__":
    main()
