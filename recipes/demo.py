"""
The whole method on the shipped text-to-music model, in minutes on two CPU cores: a short run for quality and a short
run with a high diversity reward, the two merged, then measurements and a page to listen to, all under outputs/demo/.

    make demo
    python recipes/demo.py --fresh      # forget what an earlier call has finished

What is finished is kept: a second call continues after an interruption.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in recipes/musiclm_drcd.py; two runs then share two cores

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from trl_drcd._extras import require
from trl_drcd._files import wav_bytes, write_bytes, write_text
from trl_drcd._run import distinct, load_prompts
from trl_drcd.codecs import SpectralCodec
from trl_drcd.embedders import MusicEmbedder
from trl_drcd.evaluation import TextAudioJudge
from trl_drcd.evaluation.metrics import diversity_within_prompts, per_prompt, teacher_terms
from trl_drcd.evaluation.report import comparison_page
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.evaluation.tables import compare
from trl_drcd.merging import interpolate_checkpoints

HERE = Path(__file__).resolve().parent
RUNS = {"quality": "musiclm_quality.yaml", "diversity": "musiclm_diversity.yaml"}
# Name to the folder of the model (`None` is the base), and the guidance it samples with; the slowest first
MODELS = {
    "base with CFG": (None, 3.0),
    "base": (None, 1.0),
    "quality": ("quality", 1.0),
    "merged": ("merged", 1.0),
    "diversity": ("diversity", 1.0),
}
ORDER = ["base", "base with CFG", "quality", "merged", "diversity"]  # in tables and on the page
INTERPOLATION_WEIGHT = 0.5
TEACHER_GUIDANCE, TEMPERATURE, MAX_NEW_TOKENS, SEED = 3.0, 0.99, 200, 0
COLUMNS = {
    "kl": "KL to guided teacher (nats)",
    "adherence": "text adherence",
    "diversity": "diversity",
    "entropy_per_token": "entropy (nats/token)",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of the results")
    parser.add_argument("--world", type=Path, default=HERE / "tiny_music", help="has models/ and data/")
    parser.add_argument("--steps", type=int, default=34, help="training steps of each run")
    parser.add_argument("--minutes", type=float, default=5.0, help="training of each run ends after so long anyway")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts to measure on")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt, at least 2")
    parser.add_argument("--listen", type=int, default=4, help="prompts on the page, with two samples of each")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument(
        "--measure", choices=list(MODELS), help=argparse.SUPPRESS
    )  # one model, in a process of its own
    return parser.parse_args()


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the model `name` is."""
    run = MODELS[name][0]
    return args.output / run if run else args.world / "models" / "musiclm"


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """A process of its own, whose output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet | environment
        )


def wait(processes: dict[str, subprocess.Popen], logs: Path, look: Any) -> None:
    """Calls `look()` every second until all processes have ended well; ends them all if one fails, or at Ctrl-C."""
    try:
        while True:
            look()
            for name, process in processes.items():
                if process.poll():
                    tail = (logs / f"{name}.txt").read_text().splitlines()[-15:]
                    raise SystemExit("\n".join([f"{name} failed; the end of {logs / name}.txt:", *tail]))
            if all(process.poll() == 0 for process in processes.values()):
                return
            time.sleep(1)
    finally:
        for process in processes.values():
            process.terminate()


def train(args: argparse.Namespace) -> None:
    """The two runs, at the same time, each on one core."""
    waiting = [name for name in RUNS if not (args.output / name / "README.md").exists()]
    stale = [*waiting, "merged"] if waiting else []
    for folder in (args.output / part / name for name in stale for part in ("", "measured")):
        shutil.rmtree(folder, ignore_errors=True)
    world, data = args.world / "models", args.world / "data"
    processes, bars = {}, {}
    for name in waiting:
        command = [str(HERE / "musiclm_drcd.py"), "--config", str(HERE / RUNS[name])]
        command += ["--model_name_or_path", str(world / "musiclm"), "--codec", str(world / "codec")]
        command += ["--embedder", str(world / "embedder"), "--dataset", str(data / "train_prompts.jsonl")]
        command += ["--eval_dataset", str(data / "test_prompts.jsonl"), "--output_dir", str(args.output / name)]
        command += ["--max_steps", str(args.steps), "--max_minutes", str(args.minutes), "--logging_steps", "4"]
        command += ["--diversity_warmup_steps", str(args.steps // 3)]
        # Measured below, on more prompts
        command += ["--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
        processes[name] = start(command, args.output / "logs" / f"{name}.txt")
        bars[name] = tqdm(total=args.steps, desc=f"train {name:9s}", unit="step", position=len(bars))

    def look() -> None:
        for name, bar in bars.items():
            log = args.output / name / "log.jsonl"
            entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            if entries := [entry for entry in entries if "kl" in entry]:
                bar.set_postfix(kl=f"{entries[-1]['kl']:.1f}", diversity=f"{entries[-1].get('diversity', 0):.3f}")
                bar.update(entries[-1]["step"] - bar.n)
            bar.refresh()

    wait(processes, args.output / "logs", look)
    for bar in bars.values():
        bar.close()


def merge(args: argparse.Namespace) -> None:
    """The model half way between the two runs."""
    if not (args.output / "merged").exists():
        weights = [1 - INTERPOLATION_WEIGHT, INTERPOLATION_WEIGHT]
        interpolate_checkpoints([args.output / "quality", args.output / "diversity"], weights, args.output / "merged")


def measured_values(
    model: Any, base: Any, guidance: float, args: argparse.Namespace, name: str
) -> tuple[Samples, list[tuple[torch.Tensor, int]], dict[str, list[float]]]:
    """
    Samples of a model on the held-out prompts, their audio, and what is measured of them.

    Args:
        model (`PreTrainedModel`): Samples, at guidance `guidance`.
        base (`PreTrainedModel`): Of the guided teacher.
        guidance (`float`): 1 is off.
        args (`Namespace`): With `world`, `prompts`, `samples`.
        name (`str`): Of the model, on the progress bars.

    Returns:
        `tuple`: Samples; a waveform with its rate for each; each metric's name to its mean on each prompt, `(P,)`.
    """
    models = args.world / "models"
    tokenizer = AutoTokenizer.from_pretrained(models / "musiclm")
    dataset = load_prompts("prompts", str(args.world / "data" / "test_prompts.jsonl"), "train")
    samples = sample_prompts(
        model, tokenizer, distinct(dataset["prompt"], args.prompts), args.samples, guidance,
        temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, seed=SEED, description=f"sample {name:13s}",
    )  # fmt: skip
    terms = teacher_terms(
        model, base, tokenizer, samples, TEACHER_GUIDANCE, temperature=TEMPERATURE,
        model_guidance_scale=guidance, description=f"KL     {name:13s}",
    )  # fmt: skip
    audio = SpectralCodec.from_pretrained(models / "codec").decode(samples.token_ids)
    embeddings = MusicEmbedder.from_pretrained(models / "embedder")(audio)
    adherence = TextAudioJudge.from_pretrained(models / "judge").adherence(samples.repeated_prompts, audio)
    values = {
        "kl": per_prompt(terms.kl, args.samples),
        "adherence": per_prompt(adherence, args.samples),
        "diversity": diversity_within_prompts(embeddings, args.samples),
        "entropy_per_token": per_prompt(terms.entropy / terms.tokens, args.samples),
    }
    return samples, audio, {key: value.tolist() for key, value in values.items()}


def measure(name: str, args: argparse.Namespace) -> None:
    """What is measured of one model, to `measured.json`, and some WAV files."""
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()  # of loading; sampling has its own
    base = AutoModelForCausalLM.from_pretrained(args.world / "models" / "musiclm", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder_of(name, args), dtype=torch.float32)
    samples, audio, values = measured_values(model, base, MODELS[name][1], args, name)
    folder = args.output / "measured" / name
    step = max(1, len(samples.prompts) // args.listen)
    shown = [
        i * args.samples + sample for i in range(0, len(samples.prompts), step)[: args.listen] for sample in (0, 1)
    ]
    for number, index in enumerate(shown):
        write_bytes(folder / f"{number:02d}.wav", wav_bytes(*audio[index]))
    measured = {
        "settings": settings_of(args),
        "shown": [f"{samples.repeated_prompts[index]} ({index % args.samples + 1})" for index in shown],
        "tokens_per_second": samples.tokens_per_second,
        "values": values,
    }
    write_text(folder / "measured.json", json.dumps(measured))


def settings_of(args: argparse.Namespace) -> dict[str, int]:
    """What a measurement depends on besides the model."""
    return {"prompts": args.prompts, "samples": args.samples, "listen": args.listen}


def is_measured(name: str, args: argparse.Namespace) -> bool:
    """Whether an earlier call has measured this model with these settings."""
    file = args.output / "measured" / name / "measured.json"
    return file.exists() and json.loads(file.read_text())["settings"] == settings_of(args)


def measure_all(args: argparse.Namespace) -> None:
    """Every model in a process of its own, two at a time, the next as soon as one ends."""
    waiting = [name for name in MODELS if not is_measured(name, args)]
    passed_on = [f"--{key}={getattr(args, key)}" for key in ("output", "world", "prompts", "samples", "listen")]
    running: dict[int, tuple[str, subprocess.Popen]] = {}  # by the line of the progress bar
    try:
        while waiting or running:
            for position in (0, 1):
                if position in running and running[position][1].poll() is not None:
                    name, process = running.pop(position)
                    if process.returncode:
                        raise SystemExit(f"measuring {name!r} failed")
                if position not in running and waiting:
                    name = waiting.pop(0)
                    command = [sys.executable, __file__, "--measure", name, *passed_on]
                    quiet = {"TQDM_POSITION": str(position), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
                    running[position] = name, subprocess.Popen(command, env=os.environ | quiet)
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()


def report(args: argparse.Namespace) -> str:
    """`results.jsonl`, `results.md` and `index.html` from what was measured; returns the tables."""
    folder = args.output / "measured"
    measured = {name: json.loads((folder / name / "measured.json").read_text()) for name in ORDER}
    for name in ORDER:
        measured[name]["about"] = {"model": folder_of(name, args).name, "guidance_scale": MODELS[name][1]}
    measured["merged"]["about"]["interpolation_weight"] = INTERPOLATION_WEIGHT
    about = f"{args.prompts} held-out prompts x {args.samples} samples, temperature {TEMPERATURE}, seed {SEED}; "
    about += "mean and 95 % bootstrap interval over prompts."
    shared = {"temperature": TEMPERATURE, "seed": SEED, "prompts": args.prompts, "samples_per_prompt": args.samples}
    rows, lines, tables = compare(measured, COLUMNS, about, shared)
    page = comparison_page(
        "Diversity-rewarded CFG distillation: before and after",
        about
        + " Adherence: cosine of prompt and music under the judge. Diversity: mean cosine distance of the samples "
        "of a prompt under the embedding model. Merged: the mean of the weights of quality and diversity. "
        "Spectrograms: 4 s, 0 to 4 kHz, 60 dB.",
        {"": (["", *rows["base"]], [[name, *row.values()] for name, row in rows.items()])},
        measured["base"]["shown"],
        {name: [read_wav(path) for path in sorted((folder / name).glob("*.wav"))] for name in ORDER},
    )
    for name, text in {"results.jsonl": lines, "results.md": tables, "index.html": page}.items():
        write_text(args.output / name, text)
    return tables


def read_wav(path: Path) -> tuple[torch.Tensor, int]:
    """Waveform and sampling rate."""
    waveform, rate = require("soundfile", "audio").read(path, dtype="float32")
    return torch.from_numpy(waveform), rate


def main() -> None:
    """Trains, merges, measures, reports."""
    args, began = parse(), time.time()
    if args.measure:
        return measure(args.measure, args)
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    train(args)
    merge(args)
    measure_all(args)
    print("\n" + report(args))
    print(f"Listen:  {args.output / 'index.html'}   (WAV files: {args.output / 'measured'})")
    print(f"Models:  {', '.join(str(args.output / name) for name in (*RUNS, 'merged'))}")
    print(f"Numbers: {args.output / 'results.md'}, {args.output / 'results.jsonl'}")
    print(f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
