"""
Memory of a run, update by update: rollouts, evaluations, checkpoints and logs must not pile up.

    python tests/faults/memory.py --steps 300 --plot docs/memory.png

It prints the memory after a warm-up and at the end and draws the curves; where there is a GPU, its memory too. The
memory of the process is what malloc has given out and not got back, Python's objects included. What the process has of
the machine's memory also depends on the load: pages of libraries come and go, and freed memory stays in pieces.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import psutil
import torch
from transformers import TrainerCallback
from worlds import make_trainer

from trl_drcd.callbacks import LogFile
from trl_drcd.reliability.checkpoints import checkpoints

MIB = 2**20


class Allocated(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


def in_use() -> float:
    """MiB that malloc has given out; where there is no glibc, the resident memory."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return psutil.Process().memory_info().rss / MIB
    mallinfo.restype = Allocated
    gc.collect()  # cycles are freed at other updates in every run
    allocated = mallinfo()
    return (allocated.uordblks + allocated.hblkhd) / MIB


class Measure(TrainerCallback):
    """Memory of the process in use and allocated memory of the GPU after each update, in MiB."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.rows.append((in_use(), gpu / MIB))


def run(world: str, steps: int, folder: Path) -> dict[str, Any]:
    """Memory of each update `(steps, 2)`, and what is in the folder at the end."""
    measure = Measure()
    trainer = make_trainer(
        world, folder, callbacks=[measure, LogFile()], max_steps=steps, num_iterations=1, max_completion_length=6,
        save_steps=20, eval_steps=100, logging_steps=10, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer.train()
    log = (folder / "log.jsonl").read_text()
    return {
        "memory": np.array(measure.rows),
        "checkpoints": len(checkpoints(folder)),
        "log_bytes": len(log),
        "log_entries": log.count("\n"),
    }


def medians(memory: np.ndarray, span: int) -> list[float]:
    """MiB, median of the second and of the last `span` updates; audio makes short peaks."""
    return [round(float(np.median(memory[part])), 1) for part in (slice(span, 2 * span), slice(-span, None))]


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Memory over updates, from zero, so that flat looks flat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for world, result in results.items():
        for column, kind in enumerate(("process", "GPU")):
            if (values := result["memory"][:, column]).any():
                axis.plot(range(1, len(values) + 1), values, label=f"{world}, {kind}")
    axis.set(xlabel="update", ylabel="memory (MiB)")
    axis.set_ylim(0, 1.2 * max(result["memory"].max() for result in results.values()))
    axis.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--worlds", nargs="+", default=["text", "music_lora"])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in args.worlds:
            result = results[world] = run(world, args.steps, Path(folder, world))
            for column, kind in enumerate(("process", "GPU")):
                if (memory := result["memory"][:, column]).any():
                    result[f"{kind}_MiB"] = medians(memory, args.steps // 6)
            print(world, json.dumps({key: value for key, value in result.items() if key != "memory"}), flush=True)
    if args.plot:
        plot(results, args.plot)
    return results


if __name__ == "__main__":
    if os.environ.get("PYTHONMALLOC") != "malloc":  # Python's own allocator would hide its objects
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONMALLOC": "malloc"})
    main()
