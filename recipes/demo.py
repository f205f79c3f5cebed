"""
The whole method on the shipped text-to-music model, in minutes on two CPU cores: train a short quality run and a short
run with a high diversity reward, merge the two, compare them with guidance, with temperature, and with the front that
longer training gives (`LERP of means`: the shipped means of four trainings of each, results/music/study), and write a
page to listen to. The diversity run learns from the first half of each clip: twice as many clips in the same time.
Everything is written to outputs/demo/, with --full to outputs/demo_full/.

    make demo
    python recipes/demo.py --fresh      # discard the results of an earlier call
    python recipes/demo.py --full       # the recipes' own settings, 60 and 120 steps

A second call continues after an interruption and keeps finished parts.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs share two cores

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_drcd.app.arguments import DEMO_STUDY
from trl_drcd.evaluation.grid import EvaluateArguments, evaluate
from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.report_tables import points_table
from trl_drcd.evaluation.strategies import expand
from trl_drcd.evaluation.tables import markdown
from trl_drcd.files import write_text
from trl_drcd.merging import interpolate_checkpoints
from trl_drcd.validation.yaml_files import read_yaml

HERE = Path(__file__).resolve().parent
RUNS = {"quality": "music/musiclm_quality.yaml", "diversity": "music/musiclm_diversity.yaml"}
MEASURE = "measure"  # the process that measures beside the longer run
INTERPOLATION_WEIGHT = 0.6  # of the model that is written
# What a short run has in place of its recipe's settings (results/music/demo_front)
SHORT = {
    "quality": {"max_steps": 20},
    "diversity": {
        "max_steps": 64,
        "diversity_warmup_steps": 0,  # too few steps to distil first: merging with the quality run does it
        "max_completion_length": 100,  # 2 s, with a prefix for every five tokens as in the recipe
        "diversity_prefixes": 19,
    },
}
WORLD = HERE / "tiny_music"
MEANS = HERE.parent / "results" / "music" / "study"  # models of WORLD


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the results (outputs/demo, outputs/demo_full)")
    parser.add_argument("--world", type=Path, default=WORLD, help="folder with models/ and data/")
    parser.add_argument(
        "--full", action="store_true", help="the recipes' own 60 and 120 steps, measured on 64 prompts x 8 samples"
    )
    parser.add_argument("--steps", type=int, help="training steps of each run, without --full (20 and 64)")
    parser.add_argument("--seed", type=int, default=42, help="seed of both training runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit of each training run, without --full")
    parser.add_argument("--prompts", type=int, help="held-out prompts to measure on (20; with --full 64)")
    parser.add_argument("--samples", type=int, help="samples per prompt, at least 2 (4; with --full 8)")
    parser.add_argument("--listen", type=int, default=4, help="prompts on the page")
    parser.add_argument("--fresh", action="store_true", help="start over")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    usual = (64, 8, Path("outputs/demo_full")) if args.full else (20, 4, Path("outputs/demo"))
    for name, value in zip(("prompts", "samples", "output"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Start a Python process whose output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet | environment
        )


def wait(processes: dict[str, subprocess.Popen], logs: Path, look: Callable[[], None]) -> None:
    """
    Call `look()`, which may start further processes, every second until all have succeeded; end them all if one
    fails, or on Ctrl-C.
    """
    try:
        while True:
            look()
            codes = {name: process.poll() for name, process in processes.items()}
            for name, code in codes.items():
                if code:
                    tail = (logs / f"{name}.txt").read_text().splitlines()[-15:]
                    raise SystemExit("\n".join([f"{name} failed; the end of {logs / name}.txt:", *tail]))
            if all(code == 0 for code in codes.values()):
                return
            time.sleep(1)
    finally:
        for process in processes.values():
            process.terminate()


def settings_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a run has in place of its recipe's settings."""
    steps = {} if args.steps is None else {"max_steps": args.steps}
    return {"seed": args.seed} | ({} if args.full else SHORT[name] | steps)


def check_same(args: argparse.Namespace) -> None:
    """End the program if the output folder has models of other settings, else note those of this call there."""
    file = args.output / "training.json"
    asked = {name: settings_of(name, args) for name in RUNS}
    there = any((args.output / name).exists() for name in RUNS)
    if there and file.exists() and (found := json.loads(file.read_text())) != asked:
        raise SystemExit(f"{args.output} has models of {found}, not {asked}; give --fresh, or another --output")
    write_text(file, json.dumps(asked) + "\n")


def train(args: argparse.Namespace) -> None:
    """Train both runs, each on one core; when one has ended, what does not need the other is measured beside it."""
    check_same(args)
    last = ("README.md", "model.safetensors")  # with checkpoints the card is there before the end
    waiting = [name for name in RUNS if not all((args.output / name / file).exists() for file in last)]
    for name in [*([] if args.full else waiting), "merged"] if waiting else []:
        shutil.rmtree(args.output / name, ignore_errors=True)
    world, data = args.world / "models", args.world / "data"
    processes, bars = {}, {}

    def add(name: str, command: list[str], total: int, unit: str) -> None:
        processes[name] = start(command, args.output / "logs" / f"{name}.txt")
        bars[name] = tqdm(total=total, desc=f"{name:9s}", unit=unit, position=len(bars))

    for name in waiting:
        command = [str(HERE / "musiclm_drcd.py"), "--config", str(HERE / RUNS[name])]
        command += ["--model_name_or_path", str(world / "musiclm"), "--codec", str(world / "codec")]
        command += ["--embedder", str(world / "embedder"), "--dataset", str(data / "train_prompts.jsonl")]
        command += ["--eval_dataset", str(data / "test_prompts.jsonl"), "--output_dir", str(args.output / name)]
        command += ["--logging_steps", "4", "--eval_strategy", "no", "--eval_on_start", "false"]  # evaluated below
        if args.full:
            command += ["--save_steps", "20", "--resume_from_checkpoint", "auto"]
        else:
            command += f"--max_minutes {args.minutes} --save_strategy no".split()
        settings = settings_of(name, args)
        command += [f"--{key}={value}" for key, value in settings.items()]
        steps = settings.get("max_steps") or read_yaml(HERE / RUNS[name])["max_steps"]
        add(name, command, steps, "step")

    def look() -> None:
        codes = {name: processes[name].poll() for name in waiting}
        if 0 in codes.values() and None in codes.values() and MEASURE not in processes:
            arguments = evaluation(args, running=[name for name, code in codes.items() if code is None])
            file = args.output / "logs" / f"{MEASURE}.yaml"
            write_text(file, json.dumps(asdict(arguments)) + "\n")  # JSON is YAML too
            rows = len(expand(arguments.strategies))
            add(MEASURE, ["-m", "trl_drcd.cli", "evaluate", "--config", str(file)], rows, "row")
        for name, bar in bars.items():
            log = args.output / ("results.jsonl" if name == MEASURE else f"{name}/log.jsonl")
            text = log.read_text() if log.exists() else ""
            entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # whole lines
            if name == MEASURE:
                bar.update(len(entries) - bar.n)
            elif entries := [entry for entry in entries if "kl" in entry]:
                bar.set_postfix(kl=f"{entries[-1]['kl']:.1f}", diversity=f"{entries[-1].get('diversity', 0):.3f}")
                bar.update(entries[-1]["step"] - bar.n)
            bar.refresh()

    wait(processes, args.output / "logs", look)
    for bar in bars.values():
        bar.close()


def merge(args: argparse.Namespace) -> None:
    """Merge the two runs near the diversity of the base."""
    if not (args.output / "merged").exists():
        weights = [1 - INTERPOLATION_WEIGHT, INTERPOLATION_WEIGHT]
        interpolate_checkpoints([args.output / "quality", args.output / "diversity"], weights, args.output / "merged")


def has_means(args: argparse.Namespace) -> bool:
    """Whether the shipped means are models of the demo's world."""
    return args.world.resolve() == WORLD and MEANS.is_dir()


def evaluation(args: argparse.Namespace, running: Sequence[str] = ()) -> EvaluateArguments:
    """Arguments of the evaluation, but for runs that are still `running`: Fig. 1 and 3 of the paper, few points."""
    models = args.world / "models"
    quality, diversity = (str(args.output / name) for name in RUNS)
    coefficient = read_yaml(HERE / RUNS["diversity"])["diversity_coef"]
    strategies: list[dict[str, Any]] = [
        {"name": "base"},
        {"name": "CFG", "guidance_scale": [2.0, 3.0]},
        {"name": "temperature", "temperature": [1.15]},
        {"name": "quality", "model": quality, "diversity_coef": 0},
        {"name": "diversity", "model": diversity, "diversity_coef": coefficient},
        {"name": "LERP", "models": [quality, diversity], "interpolation_weight": [0, INTERPOLATION_WEIGHT, 1]},
    ]
    if has_means(args):
        means = [str(MEANS / name) for name in ("quality", "rewarded")]
        strategies.append({"name": "LERP of means", "models": means, "interpolation_weight": [0, 0.5, 1]})
    missing = {str(args.output / name) for name in running}
    strategies = [one for one in strategies if missing.isdisjoint([one.get("model"), *one.get("models", [])])]
    return EvaluateArguments(
        str(models / "musiclm"), str(args.world / "data" / "test_prompts.jsonl"), strategies,
        output_dir=str(args.output), num_prompts=args.prompts, samples_per_prompt=args.samples,
        batch_size=args.prompts * args.samples, num_processes=1 if running else 2, codec=str(models / "codec"),
        embedder=str(models / "embedder"), second_embedder=str(models / "descriptors"), judge=str(models / "judge"),
        reference=str(models / "judge" / "reference.safetensors"), preference=str(models / "preference"),
        omega="equal", likelihood_samples=2, listen=args.listen, listen_samples=args.samples,
    )  # fmt: skip


def main() -> None:
    """Train, merge, evaluate, report."""
    args, began = parse(), time.time()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    train(args)
    merge(args)
    table = markdown(points_table(pooled(evaluate(evaluation(args)))))
    write_text(args.output / "results.md", table + "\n")
    print(f"\n{table}\n")
    print(f"Look and listen: {args.output / 'report.html'}   (WAV files: {args.output / 'samples'})")
    print(f"Models:  {', '.join(str(args.output / name) for name in (*RUNS, 'merged'))}")
    print(f"Numbers: {args.output / 'results.md'}, {args.output / 'results.jsonl'}")
    usual = args.output == Path("outputs/demo")
    study = DEMO_STUDY if usual else args.output.with_name(f"{args.output.name}_study")
    tabs = "--demo" if usual else f"--evaluation {args.output}"
    print(f"Play, slide, listen: trl-drcd app {tabs}   (extra `app`)")
    models = f"base 'CFG (gamma 3)' quality diversity 'LERP (lambda {INTERPOLATION_WEIGHT})'"
    design = f"trl-drcd ratings design --evaluation {args.output} --out {study} --raters 6 --models {models}"
    print(f"Rate as the paper's raters did: {design}")
    print(f"  then trl-drcd app {tabs if usual else f'{tabs} --study {study}'} has a third tab")
    print(f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
