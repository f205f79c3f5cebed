"""
Ship the trained base: weights in half precision, tokenizer, generation settings; and its loss on the test clips.

The weights are stored as float16 and `config.json` says `float32`, so `from_pretrained` gives a float32 model.

    python recipes/tiny_music/build/export.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from render import OUTPUT
from safetensors.torch import load_file, save_file
from scores import HERE
from train_base import Clips, validation_loss
from transformers import AutoTokenizer, LlamaForCausalLM

from trl_drcd.audio.codecs import SpectralCodec


def export(source: Path, target: Path) -> None:
    """Copy a model folder, with the weights rounded to float16."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    weights = {name: value.half() for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def plot_curves(log: Path, target: Path) -> None:
    """Training and validation loss against the step, as a PNG."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="tight")
    axes = figure.subplots()
    for name in ("train_loss", "validation_loss", "validation_loss_null"):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(target, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=OUTPUT.parent / "base" / "best")
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codec", type=Path, default=HERE / "models" / "codec")
    parser.add_argument("--output", type=Path, default=HERE / "models" / "musiclm")
    parser.add_argument("--count", type=int, default=1000, help="clips of each split to measure the loss on")
    args = parser.parse_args()
    if (args.output / "report.json").exists():
        print(f"{args.output} exists: skipped")
        return
    export(args.model, args.output)
    shutil.copy(args.model.parent / "log.jsonl", args.output / "training_log.jsonl")
    plot_curves(args.output / "training_log.jsonl", args.output / "curves.png")
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    codec = SpectralCodec.from_pretrained(args.codec)
    clips = {split: Clips(args.clips / split, codec, tokenizer) for split in ("train", "validation", "test")}
    shipped = LlamaForCausalLM.from_pretrained(args.output)
    report: dict[str, float | int] = {"parameters": shipped.num_parameters()}
    for split, data in clips.items():
        for prompt, dropout in (("caption", 0.0), ("null", 1.0)):
            report[f"{split}/{prompt}"] = round(validation_loss(shipped, data, args.count, dropout), 4)
    trained = LlamaForCausalLM.from_pretrained(args.model)
    report["validation/caption/float32"] = round(validation_loss(trained, clips["validation"], args.count, 0.0), 4)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
