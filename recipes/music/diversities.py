"""
Two embedders of music that each look at one thing: at timbre, and at harmony.

To train a model for the diversity of one of them, or to evaluate with it, from the project's folder:

    accelerate launch recipes/musiclm_drcd.py --config recipes/music/musiclm_lora.yaml --diversity_coef 300 \\
        --max_steps 120 --embedder recipes.music.diversities.timbre --output_dir outputs/runs/timbre

recipes/music/evaluate_two_diversities.yaml compares two such models and their merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trl_drcd.audio import MusicDescriptors

DESCRIPTORS = Path(__file__).parents[1] / "tiny_music/models/descriptors"


@cache
def _descriptors() -> MusicDescriptors:
    return MusicDescriptors.from_pretrained(DESCRIPTORS)


def timbre(audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
    """Mean and deviation of mel-frequency cepstral coefficients of each clip, `(len(audio), 40)`, of unit norm."""
    return _descriptors().blocks(audio, ["timbre"])["timbre"]


def harmony(audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
    """Pitch classes and intervals of each clip, `(len(audio), 48)`, of unit norm."""
    return _descriptors().blocks(audio, ["harmony"])["harmony"]
