"""
Train a music embedding model E, the one that the diversity reward listens with, on any collection of audio.

After Appendix C.1 of https://huggingface.co/papers/2410.06084: two non-overlapping chunks of 4 s of a recording are a
positive pair, chunks of other recordings are negatives; semi-hard triplet loss; noise, tempo and pitch changed at
random. The small model that the project ships, or the paper's:

    accelerate launch recipes/music/train_embedder.py --dataset my/music/
    accelerate launch recipes/music/train_embedder.py --dataset my/music/ --preset paper \\
        --recordings_per_batch 1920 --steps 200000 --versions 0 --num_workers 8

As a reward, E hears what a codec decodes from tokens: with `--codec`, half of its training audio goes through that
codec first. A folder is searched for audio files; a Hub data set needs a column of audio; an array of recordings
(N, samples) in a `.npy` file at `--sampling_rate` is taken as well. `--resume_from_checkpoint auto` continues an
interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from embedder_data import Heard, Kept, Recordings, long_enough, open_recordings
from torch.utils.data import DataLoader
from tqdm import tqdm
from trl import TrlParser

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio.embedder import PAPER
from trl_drcd.compat.extras import require
from trl_drcd.files import write_text
from trl_drcd.reliability.checkpoints import commit, find_checkpoint
from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import one_line_errors


@dataclass
class Arguments:
    """Arguments of the training: data, model and schedule."""

    dataset: str = field(metadata={"help": "Folder of audio files, `.npy` file of recordings, or hub data set."})
    split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    column: str = field(default="audio", metadata={"help": "Its column of audio."})
    sampling_rate: int = field(default=16000, metadata={"help": "Of the recordings of a `.npy` file, in Hz."})
    output_dir: str = field(default="outputs/embedder", metadata={"help": "Folder of the model, log and checkpoints."})
    preset: Literal["small", "paper"] = field(
        default="small", metadata={"help": "1 million parameters, or the paper's 25 million."}
    )
    codec: str | None = field(
        default=None, metadata={"help": "Folder of a codec that half of the audio goes through."}
    )
    versions: int = field(
        default=4,
        metadata={
            "help": "Augmented versions of each recording, computed beforehand and kept; 0: anew at every step."
        },
    )
    recordings_per_batch: int = field(default=256, metadata={"help": "Two chunks of each; over all processes."})
    steps: int = field(default=500, metadata={"help": "Updates; the paper has 200,000."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest rate of AdamW; warm-up, then cosine."})
    margin: float = field(default=0.2, metadata={"help": "Of the triplet loss, in cosine distance."})
    logging_steps: int = field(default=10, metadata={"help": "Log every so many steps."})
    save_steps: int = field(default=100, metadata={"help": "Checkpoint every so many steps; the last is kept."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`true`, `auto`, or a checkpoint's folder."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare audio where `versions` is 0."})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast."})
    seed: int = field(default=0, metadata={"help": "Of weights, augmentation and batches."})

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in {
            "versions": 0,
            "recordings_per_batch": 2,
            "steps": 1,
            "logging_steps": 1,
            "save_steps": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")


def load_recordings(args: Arguments) -> Recordings:
    """
    The recordings that the arguments name.

    Raises:
        ValueError: If there are fewer than a batch needs.
    """
    recordings = open_recordings(args.dataset, args.split, args.column, args.sampling_rate)
    check_count(args, len(recordings), "recordings")
    return recordings


def check_count(args: Arguments, count: int, what: str) -> None:
    """Raises `ValueError` for fewer recordings than a batch takes, as all in a batch differ."""
    if count < args.recordings_per_batch:
        raise ValueError(
            f"`dataset={args.dataset}` has {count} {what}, fewer than "
            f"`recordings_per_batch={args.recordings_per_batch}`; give more, or lower it"
        )


class Triplets(torch.nn.Module):
    """Embeddings of log-mel windows, shortened at random so that E has seen audio as short as short completions."""

    def __init__(self, embedder: MusicEmbedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, frames: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Frames `(b, F, M)` and the patches of each that count `(b,)` to embeddings `(b, D)` of length 1."""
        means = self.embedder.encode(frames, count).float() / count[:, None]
        with torch.autocast(frames.device.type, enabled=False):  # cosines in bfloat16 are too coarse to mine
            return self.embedder.project(means)


class Plan:
    """The batches: for each step and process, pairs `(index, version)` that depend on the seed and the step alone."""

    def __init__(self, indices: Sequence[int], args: Arguments, first_step: int, process: int, processes: int) -> None:
        self.indices, self.args, self.first_step = torch.tensor(indices), args, first_step
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.args.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.args.steps):
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            chosen = self.indices[torch.randperm(len(self.indices), generator=generator)]
            chosen = chosen[: self.args.recordings_per_batch]
            versions = torch.randint(self.args.versions or 2**31, chosen.shape, generator=generator)
            mine = slice(self.process, None, self.processes)
            yield list(zip(chosen[mine].tolist(), versions[mine].tolist(), strict=True))


def prepare(recordings: Recordings, args: Arguments, accelerator: Accelerator) -> tuple[MusicEmbedder, Any, list[int]]:
    """A new model that is scaled to the recordings, what it hears of them, and which are long enough."""
    show = accelerator.is_main_process
    codec = SpectralCodec.from_pretrained(args.codec) if args.codec else None
    sizes = PAPER if args.preset == "paper" else {}
    unscaled = Heard(recordings, MusicEmbedder(**sizes), codec, args.seed)
    indices = long_enough(unscaled, show)
    check_count(args, len(indices), "recordings that are long enough")
    first = torch.cat([unscaled[index, 0][0].float() for index in indices[:256]])
    set_seed(args.seed)
    embedder = MusicEmbedder(**sizes, mel_mean=float(first.mean()), mel_std=float(first.std())).train()
    heard: Any = Heard(recordings, embedder, codec, args.seed)
    if args.versions:
        file = Path(args.output_dir) / "heard" / f"{fingerprint(args)}.npy"
        with accelerator.main_process_first():
            heard = Kept(heard, indices, args.versions, file, show)
    return embedder, heard, indices


def train(recordings: Recordings, args: Arguments) -> MusicEmbedder:
    """
    Train, log, checkpoint and save.

    Args:
        recordings ([`Recordings`]): To train on.
        args ([`Arguments`]): Everything else.

    Returns:
        [`MusicEmbedder`]: Trained, in evaluation mode, on the CPU; also in `output_dir`.
    """
    losses = require("pytorch_metric_learning.losses", "build")
    miners = require("pytorch_metric_learning.miners", "build")
    set_seed(args.seed)
    output = Path(args.output_dir)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no", cpu=not torch.accelerator.is_available())
    show = accelerator.is_main_process
    embedder, heard, indices = prepare(recordings, args, accelerator)
    optimizer = torch.optim.AdamW(embedder.parameters(), args.learning_rate, weight_decay=0.05)
    warm_up = min(50, args.steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    model, optimizer = accelerator.prepare(Triplets(embedder), optimizer)
    step, log = 0, []
    wanted = args.resume_from_checkpoint
    if wanted and (checkpoint := find_checkpoint(wanted, args.output_dir)):
        accelerator.load_state(checkpoint)
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        step, log = state["global_step"], state["log"]
        schedule.last_epoch = step  # its rate is the optimiser's; saved by itself it would be a pickle
    plan = Plan(indices, args, step, accelerator.process_index, accelerator.num_processes)
    batches = DataLoader(heard, batch_sampler=plan, num_workers=args.num_workers)

    patches = len(embedder.positions)
    triplet_loss, miner = losses.TripletMarginLoss(args.margin), miners.TripletMarginMiner(args.margin, "semihard")
    bar = tqdm(batches, desc="train", total=args.steps, initial=step, unit="step", disable=not show)
    recent: list[torch.Tensor] = []
    for frames, shares in bar:
        generator = torch.Generator().manual_seed(
            args.seed * 1_000_003 + step + 2**40 * (1 + accelerator.process_index)
        )
        frames, shares = frames.flatten(0, 1).to(accelerator.device).float(), shares.flatten()
        # A third of the chunks is cut short
        cut = 0.25 + 0.75 * torch.rand(shares.shape, generator=generator)
        shares = shares * torch.where(torch.rand(shares.shape, generator=generator) < 0.33, cut, 1.0)
        count = (shares * patches).ceil().long().clamp(1, patches).to(accelerator.device)
        labels = torch.arange(len(frames) // 2, device=accelerator.device).repeat_interleave(2)
        with accelerator.autocast():
            embeddings = model(frames, count)
        loss = triplet_loss(embeddings.float(), labels, miner(embeddings.float(), labels))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        recent.append(accelerator.reduce(loss.detach(), "mean"))
        if step % args.logging_steps == 0 or step == args.steps:
            log.append(
                {"step": step, "loss": float(torch.stack(recent).mean()), "learning_rate": schedule.get_last_lr()[0]}
            )
            recent = []
            bar.set_postfix(loss=f"{log[-1]['loss']:.4f}")
            if show:
                write_text(output / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        if step % args.save_steps == 0 and step < args.steps:
            save_checkpoint(accelerator, output, step, log)
    embedder = accelerator.unwrap_model(model).embedder.eval().cpu()
    if show:
        embedder.save_pretrained(output)
    accelerator.wait_for_everyone()
    return embedder


def fingerprint(args: Arguments) -> str:
    """Names what the augmented audio depends on."""
    parts = [
        args.dataset,
        args.split,
        args.column,
        args.sampling_rate,
        args.preset,
        args.codec,
        args.versions,
        args.seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, log: list[dict]) -> None:
    """Writes `checkpoint-<step>` in one piece, then removes older ones."""
    temporary, final = output / f".checkpoint-{step}", output / f"checkpoint-{step}"
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        write_text(temporary / "trainer_state.json", json.dumps({"global_step": step, "log": log}))
        commit(temporary, final)
        for older in output.glob("checkpoint-*"):
            if older != final:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None) -> None:
    """Reads the arguments, trains."""
    parser = TrlParser((Arguments,), description=__doc__)
    with one_line_errors("train_embedder.py"):
        (args,) = parse_command_line(parser, sys.argv[1:] if argv is None else argv)
        recordings = load_recordings(args)
        train(recordings, args)
    print(f"The model is in {args.output_dir}")


if __name__ == "__main__":
    main()
