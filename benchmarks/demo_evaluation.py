"""
Seconds that the demo's evaluation takes in this tree and in that of another commit, in turn.

Both evaluate the grid of the first version (base, guidance 2 and 3, a temperature, two trained models, three merges;
20 prompts x 4 samples, all judges, two processes) with the other settings of their own recipes/demo.py.

    git worktree add ../first 55338b7
    python benchmarks/demo_evaluation.py --peer ../first
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "results" / "music" / "study"
EVALUATE = """
import argparse, sys, time
from pathlib import Path

import demo

if __name__ == "__main__":
    world = Path("recipes/tiny_music").resolve()
    args = argparse.Namespace(output=Path(sys.argv[1]), world=world, prompts=20, samples=4, listen=4, full=False)
    asked = demo.evaluation(args)
    models = [str(args.output / name) for name in ("quality", "diversity")]
    merges = {"name": "LERP", "models": models, "interpolation_weight": [0, 0.25, 0.5, 0.75, 1]}
    asked.strategies = [one for one in asked.strategies if "models" not in one] + [merges]
    began = time.time()
    demo.evaluate(asked)
    (args.output / "seconds").write_text(str(time.time() - began))
"""


def seconds(tree: Path, quality: Path, diversity: Path) -> float:
    """Wall clock of one evaluation, in new processes, without the imports of the first one."""
    with tempfile.TemporaryDirectory() as folder:
        output, script = Path(folder, "output"), Path(folder, "evaluate.py")
        output.mkdir()
        script.write_text(EVALUATE)
        for name, model in (("quality", quality), ("diversity", diversity)):
            (output / name).symlink_to(model.resolve())
        variables = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'recipes'}", "HF_HUB_OFFLINE": "1"}
        variables.setdefault("OMP_NUM_THREADS", "1")
        done = subprocess.run(
            [sys.executable, script, output],
            cwd=tree,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            raise SystemExit(f"the evaluation in {tree} failed:\n{done.stderr.decode()[-2000:]}")
        return float((output / "seconds").read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=MODELS / "quality", help="folder of a model")
    parser.add_argument("--diversity", type=Path, default=MODELS / "rewarded", help="folder of another")
    parser.add_argument("--peer", type=Path, help="tree of the other commit; without it only this one is measured")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    for model in (args.quality, args.diversity):
        if not model.is_dir():
            parser.error(f"{model} is no folder; name that of a trained model")
    trees = {"ours": ROOT} | ({"peer": args.peer.resolve()} if args.peer else {})
    found: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(args.rounds):
        for name, tree in trees.items():
            found[name].append(round(seconds(tree, args.quality, args.diversity), 1))
            print(name, found[name][-1], "s", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
