"""
Seconds of one training step against the number of sequences N, completion tokens S, vocabulary V, generations of a
prompt G, and ranks; one of them varies, the others keep their default.

A random Llama (6 layers, hidden size 256) in float32, guided teacher, diversity reward with a cheap embedder, no
gradient checkpointing; trainer and clock are those of training_step.py. N counts the sequences of all ranks, so that
more ranks divide the same work. Every point is a new process (a new `torchrun` with several ranks) with a warm-up step
and `--steps` timed ones; its median is of rank 0. Finished points are kept, and an interrupted run goes on.

    OMP_NUM_THREADS=1 python benchmarks/cost_curves.py --output benchmarks/results/cost_curves.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import training_step
from matplotlib.figure import Figure
from tqdm import tqdm

from trl_drcd.evaluation.plots import save
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text

DEFAULTS = {"sequences": 16, "completion_length": 100, "vocab_size": 2048, "generations": 4, "ranks": 1}
CURVES = {
    "sequences": [8, 16, 32, 64],
    "completion_length": [50, 100, 200, 400],
    "vocab_size": [2048, 16384, 65536, 131072],
    "generations": [2, 4, 8, 16],
    "ranks": [1, 2],
}
LABELS = {
    "sequences": "sequences N",
    "completion_length": "completion tokens S",
    "vocab_size": "vocabulary V",
    "generations": "generations of a prompt G",
    "ranks": "ranks (processes)",
}
PARTS = {"rollout": "#0072B2", "teacher": "#D55E00", "update": "#009E73"}


def measure(point: dict[str, int], steps: int) -> dict[str, float]:
    """Median seconds of a step and of its parts, on this rank."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = argparse.Namespace(
        model=None, vocab_size=point["vocab_size"], batch=point["sequences"] // point["ranks"], accumulation=1,
        generations=point["generations"], prompt_tokens=None, completion_length=point["completion_length"],
        steps=steps, bf16=False,
    )  # fmt: skip
    clock = training_step.Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        clock.trainer = training_step.build("ours", settings, folder, clock)
        clock.trainer.train()
    timed = clock.steps[1:-1]
    return {name: statistics.median(step[name] for step in timed) for name in ("total", *PARTS)}


def in_new_processes(point: dict[str, int], steps: int) -> dict[str, float]:
    """[`measure`] in as many processes as the point has ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point['ranks']}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *(launch if point["ranks"] > 1 else []), __file__, "--steps", str(steps)]
        command += ["--point", json.dumps(point), "--output", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{point} failed:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def plot(seconds: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """A panel for each curve: the whole step and its parts, both axes logarithmic."""
    figure = Figure((3 * len(seconds), 3.2), layout="constrained")
    panels = figure.subplots(1, len(seconds), sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(panels, seconds.items(), strict=True):
        values = [int(value) for value in points]
        for part, colour in ({"total": "#000000"} | PARTS).items():
            axes.plot(values, [one[part] for one in points.values()], "o-", color=colour, label=part)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(LABELS[name])
        axes.grid(alpha=0.3)
    panels[0].set_yticks(ticks := [2.0**power for power in range(-4, 6)], [f"{tick:g}" for tick in ticks])
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(frameon=False)
    return figure


def main() -> None:
    """Measure what is missing; write the JSON file after each point, and the plot (PNG and SVG) beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each point")
    parser.add_argument("--output", type=Path, default=Path("outputs/cost_curves.json"), help="JSON; plot beside it")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one point, in this process
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.point:
        found = measure(args.point, args.steps)
        if os.environ.get("RANK", "0") == "0":
            write_text(args.output, json.dumps(found))
        return
    record = {"steps": args.steps, "defaults": DEFAULTS, "machine": training_step.machine(), "seconds": {}}
    if args.output.exists():
        before = json.loads(args.output.read_text())
        asked = [args.steps, DEFAULTS, record["machine"]["device"]]
        if [before["steps"], before["defaults"], before["machine"]["device"]] != asked:
            parser.error(
                f"--output {args.output} has points of other settings or of another machine; name another file"
            )
        record = before
    seconds: dict[str, dict[str, dict[str, float]]] = record["seconds"]
    waiting = [(name, value) for name, values in CURVES.items() for value in values]
    for name, value in (bar := tqdm(waiting, unit="point")):
        bar.set_postfix_str(f"{LABELS[name]} {value}")
        if str(value) not in seconds.setdefault(name, {}):
            seconds[name][str(value)] = in_new_processes(DEFAULTS | {name: value}, args.steps)
            write_text(args.output, json.dumps(record, indent=1) + "\n")
    save(plot(seconds), args.output)
    print(
        markdown_table(
            {f"{LABELS[n]} = {value}": one for n, points in seconds.items() for value, one in points.items()}
        )
    )


if __name__ == "__main__":
    main()
