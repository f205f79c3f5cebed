"""
The prompts for fine-tuning and for evaluation: captions of train and test clips.

A fifth of the combinations of instrument, tempo and kind is held out: training prompts are captions of clips of the
other combinations, test prompts those of test clips of the held-out ones, in texts that no training prompt has.
Columns: `prompt`, and `instrument`, `tempo`, `kind`, `key` where the prompt names them, else null.

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
from render import OUTPUT, read_metadata
from scores import HERE


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
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--counts", type=int, nargs=2, default=[2000, 400], help="train, test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = [args.output / f"{split}_prompts.jsonl" for split in ("train", "test")]
    if all(path.exists() for path in paths):
        print(f"{paths[0]} and {paths[1].name} exist: skipped")
        return
    rows = {split: read_metadata(args.clips / split) for split in ("train", "test")}
    train = draw([row for row in rows["train"] if not held_out(row)], args.counts[0], set(), args.seed)
    taken = {prompt["prompt"].lower() for prompt in train}
    test = draw([row for row in rows["test"] if held_out(row)], args.counts[1], taken, args.seed + 1)
    write(paths[0], train)
    write(paths[1], test)
    print(f"{len(train)} training and {len(test)} test prompts")


if __name__ == "__main__":
    main()
