"""Create a study from an evaluation: the design, the clips under random names, the database."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from trl_drcd.compat.extras import require
from trl_drcd.files import wav_bytes, write_bytes, write_text
from trl_drcd.ratings.design import Clip, Design, DesignArguments, make_design, strategies_of
from trl_drcd.ratings.samples import Evaluation, read_evaluation
from trl_drcd.ratings.store import CLIPS_FOLDER, FILE, Study

NONSENSE = "? ? ?"
NOISE = 1.0  # power of the noise in a degraded clip, relative to the clip's


def create_study(arguments: DesignArguments) -> tuple[Study, Design]:
    """
    Create a study: `study.sqlite` and `clips/` in `arguments.out`. The folder is self-contained, and no file name in
    it reveals the model of a clip.

    Args:
        arguments ([`DesignArguments`]): Settings of the study.

    Returns:
        `tuple`: The study, and its design.

    Raises:
        FileExistsError: If the folder already has a study.
        FileNotFoundError, ValueError: As for [`read_evaluation`] and [`make_design`].
    """
    out = Path(arguments.out)
    if (out / FILE).exists():
        raise FileExistsError(f"`out={out}` already has a study, which may contain ratings; give another folder")
    evaluation = read_evaluation(arguments.evaluation)
    models = strategies_of(arguments, {result.name: result.samples for result in evaluation.results})
    design = make_design(
        models, len(evaluation.prompts), evaluation.samples, prompts_of(arguments, evaluation), arguments.raters,
        arguments.raters_per_item, arguments.checks, arguments.seed,
    )  # fmt: skip
    clips = dict.fromkeys(clip for item in design.items for side in item.clips for clip in side)
    names = copy_clips(clips, evaluation, out / CLIPS_FOLDER)
    about = {
        "kind": evaluation.kind,
        "models": models,
        "left_out": [name for name in evaluation.files if name not in models] if not arguments.models else [],
        "evaluation": str(evaluation.folder.resolve()),
        "salt": secrets.token_hex(16),
        "samples": {result.name: result.but_judges for result in evaluation.results},
        "design": asdict(arguments),
    }
    return Study.create(out, design.items, design.slots, evaluation.prompts, names, about), design


def prompts_of(arguments: DesignArguments, evaluation: Evaluation) -> dict[str, int]:
    """Number of prompts of each question; by default all, but none for diversity if there are only single samples."""
    every = len(evaluation.prompts)
    quality, diversity = arguments.quality_prompts, arguments.diversity_prompts
    return {
        "quality": every if quality is None else quality,
        "diversity": (every if evaluation.samples > 1 else 0) if diversity is None else diversity,
    }


def copy_clips(clips: Iterable[Clip], evaluation: Evaluation, folder: Path) -> dict[Clip, str]:
    """Copy clips to a folder under random names; return the name of each."""
    names = {}
    for clip in clips:
        model, prompt, sample, degraded = clip
        source = evaluation.files[model][prompt][sample]
        names[clip] = f"{secrets.token_hex(8)}{source.suffix}"
        target = folder / names[clip]
        if not degraded:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        elif source.suffix == ".txt":
            write_text(target, degraded_text(source.read_text(encoding="utf-8")))
        else:
            waveform, rate = require("soundfile", "audio").read(source, dtype="float32")  # (T,), or (T, C) of several
            write_bytes(target, wav_bytes(degraded_audio(torch.from_numpy(waveform.T)), rate))
    return names


def degraded_audio(waveform: torch.Tensor) -> torch.Tensor:
    """Add white noise of equal power to a clip, `(T,)` or `(C, T)`; an attentive rater must find it worse."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(waveform.shape).astype(np.float32))
    power = max(float(waveform.square().mean()), 1e-4)
    return (waveform + noise * (NOISE * power) ** 0.5).clamp(-1, 1)


def degraded_text(text: str) -> str:
    """Shuffle the words of a text or, where that changes nothing, its letters; else add what means nothing."""
    words, letters = text.split(), list(text)
    for parts, between in ((words, " "), (letters, "")):
        shuffled = between.join(parts[i] for i in np.random.default_rng(0).permutation(len(parts)))
        if shuffled.split() != words:
            return shuffled
    return f"{text} {NONSENSE}".strip()
