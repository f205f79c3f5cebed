"""
Seconds of a training step on a CPU by number of threads and by how long waiting threads spin, with and without load.

Each figure is the median of `--steps` steps of 32 sequences of 200 tokens of the shipped model, float32, in a new
process: the training step of `training_step.py`. Load is one process that computes without pause (`busy`), or a
second training of the same kind (`twin`, the mean of both).

    python benchmarks/threads.py --output benchmarks/results/threads.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

from tqdm import tqdm

from trl_drcd.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import json, sys
sys.argv = ["training_step.py", "--batch", "32", "--steps", sys.argv[1], "--threads", sys.argv[2]]
import training_step
print(json.dumps(training_step.measure("ours", training_step.parse())))
"""
BUSY = "while True: sum(range(100000))"
LOADS = ("idle", "busy", "twin")
PARTS = ("rollout", "teacher", "update", "total")


def start(threads: int, spins: int | None, steps: int) -> subprocess.Popen[str]:
    """A process that measures a step; `spins` is GOMP_SPINCOUNT, or libgomp's default if `None`."""
    variables = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    variables |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    variables |= {"GOMP_SPINCOUNT": str(spins)} if spins is not None else {}
    words = [sys.executable, "-c", MEASURE, str(steps), str(threads)]
    return subprocess.Popen(
        words, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def measure(load: str, threads: int, spins: int | None, settings: argparse.Namespace) -> dict[str, float] | None:
    """Seconds of each part, the mean over the trainings; `None` if it took longer than `--limit`."""
    trainings = [start(threads, spins, settings.steps) for _ in range(2 if load == "twin" else 1)]
    others = [subprocess.Popen([sys.executable, "-c", BUSY])] if load == "busy" else []
    try:
        found = [json.loads(one.communicate(timeout=settings.limit)[0].splitlines()[-1]) for one in trainings]
        return {part: statistics.mean(one[part] for one in found) for part in PARTS}
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in trainings + others:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--spins", type=int, nargs="+", default=[1000, 10000], help="besides libgomp's default")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which a process is given up")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    settings = parser.parse_args()
    rows = []
    print("| load | threads | spins | " + " | ".join(PARTS) + " |\n" + "|---" * (3 + len(PARTS)) + "|")
    cells = [(t, spins) for t in settings.threads for spins in ([None] if t == 1 else [None, *settings.spins])]
    for load, (threads, spins) in tqdm(list(product(LOADS, cells)), unit="process"):
        found = measure(load, threads, spins, settings)
        rows.append({"load": load, "threads": threads, "spins": spins, "seconds": found})
        figures = [f"{found[part]:.2f}" if found else f"over {settings.limit:.0f} in all" for part in PARTS]
        tqdm.write(f"| {load} | {threads} | {spins or 'default'} | " + " | ".join(figures) + " |", file=sys.stdout)
    if settings.output:
        record = {"cores": os.cpu_count(), "load at the end": os.getloadavg(), "steps": settings.steps}
        write_text(settings.output, json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
