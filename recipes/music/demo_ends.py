"""
The two trainings of `make demo` alone, as recipes/demo.py of a tree has them, without its time limit.

    python recipes/music/demo_ends.py TREE UPDATES FOLDER
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
    parser.add_argument("updates", type=int, help="updates of each run")
    parser.add_argument("folder", type=Path, help="folder to write `quality` and `diversity` to")
    given = parser.parse_args()
    tree, output = given.tree.resolve(), given.folder.resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / "recipes")])
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "recipes")]
    import demo

    world = tree / "recipes" / "tiny_music"
    demo.train(argparse.Namespace(output=output, world=world, steps=given.updates, minutes=60.0, full=False))


if __name__ == "__main__":
    main()
