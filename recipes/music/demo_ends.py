"""
The two trainings of `make demo` alone, as recipes/demo.py of a tree has them, without its time limit.

    python recipes/music/demo_ends.py TREE FOLDER --seed 1
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    """Train both ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="a checkout of this project")
    parser.add_argument("folder", type=Path, help="folder to write `quality` and `diversity` to")
    parser.add_argument("--updates", type=int, help="updates of each run (the demo's own)")
    parser.add_argument("--seed", type=int, default=42, help="of both runs (in trees whose demo has this option)")
    given = parser.parse_args()
    tree, output = given.tree.resolve(), given.folder.resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / "recipes")])
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "recipes")]
    import demo

    world = tree / "recipes" / "tiny_music"
    asked = {
        "output": output,
        "world": world,
        "steps": given.updates,
        "seed": given.seed,
        "minutes": 60.0,
        "full": False,
    }
    demo.train(argparse.Namespace(**asked))


if __name__ == "__main__":
    main()
