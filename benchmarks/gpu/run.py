"""
Half an hour on one GPU: what this package has to show there, most valuable first.

    python benchmarks/gpu/run.py                       # all parts, into outputs/gpu; run again to go on
    python benchmarks/gpu/run.py --only loss steps     # some of them
    python benchmarks/gpu/run.py --small --minutes 2   # the same at sizes for a CPU, to see that nothing fails

Each part runs in processes of its own, with a time limit, and leaves a folder with its log and its results. A part
that has succeeded is not run again; one that failed or ran out of time does not stop the others. `summary.json` and
`summary.md` say what came of each, and are written after each part.

- `correctness`: loss and gradient of the package on the device, in float32 and with bfloat16 autocast, all weights and
  LoRA, a causal LM and a MusicGen, against the same computation in float64 on the CPU;
- `fsdp2`: two updates of the shipped recipe with FSDP2 on the one GPU;
- `steps`: seconds and peak memory of an update, models of the published sizes with random weights, all weights and
  LoRA, beside the memory that `musicgen_memory.py` computes;
- `loss`: the fused loss against TRL's chunked loss and the dense one, at vocabularies of 49k and 256k;
- `rollout`: the decode loop against transformers' `generate`;
- `compiled`: the same with a static cache and compiled steps, as CUDA graphs (`cache_implementation: static`);
- `rloo`: a step against TRL's RLOO step without a teacher;
- `front`: the shipped music model, quality and diversity at 512 sequences an update, merged and evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trl_drcd.files import write_text
from trl_drcd.markdown import markdown_table

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """Commands that run one after another, on a GPU and small; `{out}` in them is the part's folder."""

    name: str
    minutes: float
    commands: tuple[str, ...]
    small: tuple[str, ...]


MUSIC = "-m trl_drcd.scripts.train_music --config recipes/music"
FEW = (
    "--max_steps 1 --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 24 --eval_strategy no "
    "--num_samples 1 --diversity_warmup_steps 0"
)
MANY = (
    "--per_device_train_batch_size 128 --gradient_accumulation_steps 4 --max_steps 60 --eval_steps 60 --bf16 true "
    "--diversity_warmup_steps 20"
)
SMALL_FRONT = f"{FEW} --output_dir {{out}}"
FRONT = "recipes/music/evaluate_all_weights.yaml"

PARTS = (
    Part("correctness", 3, ("benchmarks/gpu/correctness.py --output {out}/result.json",) , ()),
    Part(
        "fsdp2",
        2,
        (f"-m accelerate.commands.launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 1 {MUSIC}"
         f"/musiclm_diversity.yaml {FEW} --output_dir {{out}}/model",),
        (f"-m accelerate.commands.launch --cpu --num_processes 1 {MUSIC}/musiclm_diversity.yaml {FEW} "
         "--output_dir {out}/model",),
    ),
    Part("steps", 6, ("benchmarks/gpu/steps.py --output {out}/result.json",),
         ("benchmarks/gpu/steps.py --small --output {out}/result.json",)),
    Part("loss", 2, ("benchmarks/loss_memory.py --tokens 4096 --output {out}/result.json",),
         ("benchmarks/loss_memory.py --tokens 32 --vocabularies 512 --output {out}/result.json",)),
    Part("rollout", 3, ("benchmarks/rollout.py --only musiclm musicgen-tiny musicgen-small --small 16 256 "
                        "--output {out}/result.json",),
         ("benchmarks/rollout.py --only musicgen-tiny --rounds 1 --output {out}/result.json",)),
    Part("compiled", 4, ("benchmarks/rollout.py --static --only musiclm musicgen-tiny musicgen-small --small 16 256 "
                         "--output {out}/result.json",),
         ("benchmarks/rollout.py --static --only musicgen-tiny --rounds 1 --output {out}/result.json",)),
    Part("rloo", 3, ("benchmarks/training_step.py --batch 128 --rounds 2 --output {out}/result.json",),
         ("benchmarks/training_step.py --batch 8 --completion_length 16 --steps 1 --rounds 1 --vocab_size 64 "
          "--output {out}/result.json",)),
    Part(
        "front",
        8,
        (f"{MUSIC}/musiclm_quality.yaml {MANY} --output_dir {{out}}/quality",
         f"{MUSIC}/musiclm_diversity.yaml {MANY} --output_dir {{out}}/diversity",
         "benchmarks/gpu/front.py --ends {out}/quality {out}/diversity --output {out}/evaluation"),
        (f"{MUSIC}/musiclm_quality.yaml {SMALL_FRONT}/quality",
         f"{MUSIC}/musiclm_diversity.yaml {SMALL_FRONT}/diversity",
         "benchmarks/gpu/front.py --small --ends {out}/quality {out}/diversity --output {out}/evaluation"),
    ),
)  # fmt: skip


def run(part: Part, out: Path, small: bool, minutes: float) -> dict[str, Any]:
    """The part's commands, until one fails or the time is over: `state` is `done`, `failed` or `out of time`."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    state = "done"
    with open(out / "log.txt", "a") as log:
        for command in part.small if small and part.small else part.commands:
            words = command.format(out=out).split()
            print(f"$ python {' '.join(words)}", file=log, flush=True)
            left = 60 * minutes - (time.monotonic() - start)
            code = call([PYTHON, *words], left, log, environment)
            if code:
                state = "out of time" if code == "time" else f"failed ({code})"
                break
    return {"state": state, "seconds": round(time.monotonic() - start, 1)}


def call(words: list[str], seconds: float, log: Any, environment: dict[str, str]) -> int | str:
    """Exit status, or `"time"`; nothing that the command started outlives it."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return "time"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarise(folder: Path, machine: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
    """Writes what came of every part, and its results."""
    results = {}
    for name, state in states.items():
        file = folder / name / "result.json"
        results[name] = state | ({"result": json.loads(file.read_text())} if file.is_file() else {})
    write_text(folder / "summary.json", json.dumps({"machine": machine, "parts": results}, indent=1))
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    write_text(folder / "summary.md", f"{about}\n\n{markdown_table(states)}\n")


def machine() -> dict[str, Any]:
    """What was measured on."""
    if not torch.cuda.is_available():
        return {"device": "CPU", "torch": torch.__version__}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "device": torch.cuda.get_device_name(),
        "memory (GiB)": round(memory, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; the exit status is the number of those that were not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="names of parts")
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together; each has its share")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.small:
        parser.error("there is no GPU here; `--small` runs the parts at sizes for a CPU")
    parts = [part for part in PARTS if part.name in args.only]
    folder, share = args.output.resolve(), args.minutes / sum(part.minutes for part in PARTS)
    states: dict[str, dict[str, Any]] = {}
    if (folder / "summary.json").is_file():
        found = json.loads((folder / "summary.json").read_text())["parts"]
        states = {name: {"state": f["state"], "seconds": f["seconds"]} for name, f in found.items()}
    with tqdm(parts, desc="parts") as bar:
        for part in bar:
            if states.get(part.name, {}).get("state") == "done":
                continue
            bar.set_postfix_str(part.name)
            states[part.name] = run(part, folder / part.name, args.small, share * part.minutes)
            summarise(folder, machine(), states)
    print((folder / "summary.md").read_text())
    return sum(states[part.name]["state"] != "done" for part in parts)


if __name__ == "__main__":
    sys.exit(main())
