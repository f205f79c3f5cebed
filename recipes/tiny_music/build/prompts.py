"""
The prompts for fine-tuning and for evaluation: captions of train and test clips.

A fifth of the combinations of instrument, tempo and kind is held out: training prompts are captions of clips of the
other combinations, test prompts those of test clips of the held-out ones, in texts that no training prompt has.
`fresh` prompts are drawn like test prompts and have none of their texts: for results on which nothing was chosen.
Columns: `prompt`, and `instrument`, `tempo`, `kind`, `key` where the prompt names them, else null. The clips are those
that `render.py` plans by default; they need not be rendered. Existing files are kept, and their texts not drawn again.

    python recipes/tiny_music/build/prompts.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from pathlib import Path

from captions import NAMED, caption
from render import RECORDINGS, plan_split
from scores import HERE, read_scores


def held_out(row: dict) -> bool:
    """Whether the clip's combination of instrument, tempo and kind is kept for the test prompts."""
    name = "/".join(row[attribute] for attribute in ("instrument", "tempo", "kind"))
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 5 == 0


def draw(rows: list[dict], count: int, taken: set[str], seed: int) -> list[dict]:
    """`count` different prompts of the given clips, none of them in `taken`."""
    rng, prompts = random.Random(seed), {}
    for _ in range(100 * count):
        row = rng.choice(rows)
        named = {a for a, share in NAMED.items() if rng.random() < share} or {"instrument"}
        text = caption(row, rng, named)
        if text.lower() not in taken:
            prompts.setdefault(text.lower(), {"prompt": text} | {a: row[a] if a in named else None for a in NAMED})
        if len(prompts) == count:
            return list(prompts.values())
    raise ValueError(f"count is {count}; the clips have only {len(prompts)} different captions")


def write(path: Path, prompts: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=HERE / "data" / "scores.jsonl.gz")
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--counts", type=int, nargs=3, default=[2000, 400, 208], help="train, test, fresh")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = {split: args.output / f"{split}_prompts.jsonl" for split in ("train", "test", "fresh")}
    if all(path.exists() for path in paths.values()):
        print(f"{', '.join(map(str, paths.values()))} exist: skipped")
        return
    scores = read_scores(args.scores)
    clips = {
        split: [row for row in plan_split(split, scores, RECORDINGS[split], args.seed) for _ in row["starts"]]
        for split in ("train", "test")
    }
    pools = {
        "train": [row for row in clips["train"] if not held_out(row)],
        "test": [row for row in clips["test"] if held_out(row)],
    }
    pools["fresh"] = pools["test"]
    taken: set[str] = set()
    for offset, ((split, path), count) in enumerate(zip(paths.items(), args.counts, strict=True)):
        if path.exists():
            drawn = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            drawn = draw(pools[split], count, taken, args.seed + offset)
            write(path, drawn)
            print(f"{path}: {count} prompts")
        taken |= {prompt["prompt"].lower() for prompt in drawn}


if __name__ == "__main__":
    main()
