"""
Diversity of the samples of a prompt: of embeddings, and of words for text.

Letters: `P` prompts, `B` samples, `D` embedding size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from trl_drcd.diversity import group_diversity
from trl_drcd.evaluation.statistics import Interval, bootstrap_interval


def per_prompt(values: ArrayLike, samples_per_prompt: int) -> np.ndarray:
    """Mean over the samples of each prompt: `(P * samples_per_prompt,)` to `(P,)`."""
    return np.asarray(values, dtype=np.float64).reshape(-1, samples_per_prompt).mean(1)


def diversity_within_prompts(embeddings: torch.Tensor, samples_per_prompt: int) -> np.ndarray:
    """
    Mean cosine distance between the samples of each prompt: Eq. (3) and (7) of
    https://huggingface.co/papers/2410.06084.

    It is 0 if all samples are equal, and [`diversity_between_prompts`] for a model that ignores its prompt.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the samples of one prompt contiguous.
        samples_per_prompt (`int`): At least 2.

    Returns:
        `np.ndarray`: Shape `(P,)`, no unit, in `[0, 2]`.
    """
    return per_prompt(group_diversity(embeddings, samples_per_prompt), samples_per_prompt)


def diversity_between_prompts(embeddings: torch.Tensor, samples_per_prompt: int, seed: int = 0) -> Interval:
    """
    Mean cosine distance between samples of different prompts, with its bootstrap interval over prompts: an upper
    reference for the diversity within prompts.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the samples of a prompt contiguous; at least two prompts.
        samples_per_prompt (`int`): Samples of each prompt.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        `Interval`: `mean`, `low`, `high`; no unit, in `[0, 2]`.

    Raises:
        ValueError: If there is only one prompt.
    """
    if len(embeddings) <= samples_per_prompt:
        raise ValueError(
            f"`embeddings` holds {len(embeddings)} samples of one prompt; at least two prompts are needed"
        )
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    means = unit.unflatten(0, (-1, samples_per_prompt)).mean(1)
    distances = (1 - means @ means.T).numpy()

    def mean(rows: np.ndarray) -> float:
        chosen = rows.astype(int)
        different = chosen[:, None] != chosen
        # A draw that contains only one prompt has no such pair
        return float(distances[np.ix_(chosen, chosen)][different].mean()) if different.any() else np.nan

    return bootstrap_interval(np.arange(len(distances)), mean, resamples=500, seed=seed)


def _groups(texts: list[str], samples_per_prompt: int) -> list[list[str]]:
    return [texts[i : i + samples_per_prompt] for i in range(0, len(texts), samples_per_prompt)]


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct-n: number of distinct word n-grams over the number of all; 0 if there are none."""
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(texts: list[str], samples_per_prompt: int) -> np.ndarray:
    """Distinct-2 of each prompt's completions, `(P,)`, in `[0, 1]`."""
    return np.array([distinct_n(group, 2) for group in _groups(texts, samples_per_prompt)])


def self_bleu(texts: list[str], samples_per_prompt: int) -> np.ndarray | None:
    """
    Self-BLEU: mean BLEU of each completion against the others of its prompt, `(P,)`, 0 to 100; `None` if sacrebleu is
    not installed (extra `text`).
    """
    try:
        from sacrebleu import sentence_bleu
    except ImportError:
        return None
    scores = [
        np.mean([sentence_bleu(text, group[:i] + group[i + 1 :]).score for i, text in enumerate(group)])
        for group in _groups(texts, samples_per_prompt)
    ]
    return np.array(scores)
