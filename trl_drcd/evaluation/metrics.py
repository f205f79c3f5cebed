"""
What is measured of samples: distance to the guided teacher, entropy, diversity, and bootstrap intervals over prompts.

Letters: `P` prompts, `B` sequences, `S` steps, `K` codebooks, `V` vocabulary, `D` embedding size. KL and entropy are
in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from trl_drcd.diversity import group_diversity
from trl_drcd.evaluation.sampling import Samples, tokenize_prompts
from trl_drcd.guidance import left_pad
from trl_drcd.losses import LOGITS_PER_CHUNK, guided_logits, reverse_kl, sum_per_sequence
from trl_drcd.policies import Policy, policy_for


def bootstrap_interval(
    values: Any,
    statistic: Callable[[np.ndarray], Any] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """
    A statistic and its percentile bootstrap interval over prompts.

    Prompts are drawn with replacement. The draws depend on the seed and on `P` alone, so that intervals of several
    models on the same prompts are paired; several columns are drawn together, for differences and ratios:
    `bootstrap_interval(np.stack([after, before], 1), lambda v: 1 - v[:, 0].mean() / v[:, 1].mean())`.

    Args:
        values (array): Shape `(P,)` or `(P, columns)`, one row per prompt.
        statistic (`Callable`, *optional*): Maps rows to a number; the mean over what is not NaN if `None`.
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        level (`float`, *optional*, defaults to 0.95): Coverage, between 0 and 1.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, float]`: `mean` (the statistic of the values as they are), `low`, `high`; the unit of the values.

    Raises:
        ValueError: If there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("`values` is empty; expected one row per prompt")
    statistic = statistic or np.nanmean
    draws = bootstrap_draws(len(values), resamples, seed)
    tail = (1 - level) / 2
    low, high = np.nanquantile([statistic(values[draw]) for draw in draws], [tail, 1 - tail])
    return {"mean": float(statistic(values)), "low": float(low), "high": float(high)}


def bootstrap_draws(prompts: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Prompts drawn with replacement, int, shape `(resamples, prompts)`; the same for the same arguments."""
    return np.random.default_rng(seed).integers(0, prompts, (resamples, prompts))


def resampled_means(values: Any, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """
    The mean over training seeds and prompts, followed by its bootstrap draws.

    Prompts and seeds are drawn with replacement, crossed; the draws depend on `seed`, `P` and `R` alone, so that what
    is computed of the means of several models, draw by draw, is paired. With a single seed only prompts are drawn.
    Few seeds make the interval too narrow: drawing from R of them has `(R - 1) / R` of their variance.

    Args:
        values (array): Shape `(R, P)`: training seeds by prompts; what is NaN is left out.
        resamples (`int`, *optional*, defaults to 2000): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `np.ndarray`: Shape `(1 + resamples,)`, the mean first; see [`interval_of`].

    Raises:
        ValueError: If the shape is another, or there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"`values` must have shape (R, P), none of them 0, got {values.shape}")
    runs, prompts = values.shape
    times = _times_drawn(prompts, resamples, seed)
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means = (times @ np.where(known, values, 0).T) / (times @ known.T)
    chosen = np.concatenate([np.arange(runs)[None], bootstrap_draws(runs, resamples, seed + 1)])
    return np.take_along_axis(means, chosen, 1).mean(1)


@lru_cache(maxsize=4)
def _times_drawn(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, `(1 + resamples, prompts)`; once in the first row."""
    drawn = [np.bincount(draw, minlength=prompts) for draw in bootstrap_draws(prompts, resamples, seed)]
    return np.concatenate([np.ones((1, prompts)), drawn])


def interval_of(draws: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """A statistic of [`resampled_means`], shape `(1 + resamples,)`, as `mean` (the first), `low` and `high`."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws[1:], [tail, 1 - tail])
    return {"mean": float(draws[0]), "low": float(low), "high": float(high)}


def per_prompt(values: Any, samples_per_prompt: int) -> np.ndarray:
    """Mean over the samples of each prompt: `(P * samples_per_prompt,)` to `(P,)`."""
    return np.asarray(values, dtype=np.float64).reshape(-1, samples_per_prompt).mean(1)


def diversity_within_prompts(embeddings: torch.Tensor, samples_per_prompt: int) -> np.ndarray:
    """
    Eq. (3) and (7) of https://huggingface.co/papers/2410.06084 for each prompt: mean cosine distance of its samples.

    Its floor is 0 (all samples equal); [`diversity_between_prompts`] is what a model reaches that ignores its prompt.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the samples of one prompt contiguous.
        samples_per_prompt (`int`): At least 2.

    Returns:
        `np.ndarray`: Shape `(P,)`, no unit, in `[0, 2]`.
    """
    return per_prompt(group_diversity(embeddings, samples_per_prompt), samples_per_prompt)


def diversity_between_prompts(embeddings: torch.Tensor, samples_per_prompt: int, seed: int = 0) -> dict[str, float]:
    """
    Mean cosine distance of samples of different prompts, the ceiling of the diversity within prompts, with its
    bootstrap interval over prompts.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the samples of a prompt contiguous; at least two prompts.
        samples_per_prompt (`int`): Samples of each.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, float]`: `mean`, `low`, `high`; no unit, in `[0, 2]`.

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
        # A draw of one prompt alone says nothing
        return float(distances[np.ix_(chosen, chosen)][different].mean()) if different.any() else np.nan

    return bootstrap_interval(np.arange(len(distances)), mean, resamples=500, seed=seed)


class SequenceTerms(NamedTuple):
    """Sums over the tokens of each sequence, shape `(B,)`: `kl`, `entropy` (nats), and the number of `tokens`."""

    kl: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


def right_pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Completion ids and mask, int64 `(B, S)`."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()


def completion_logits(
    policy: Policy, model: Any, streams: list[list[list[int]]], completion: Any, guidance_scale: float
) -> list[Callable[[slice], torch.Tensor]]:
    """For each codebook, a function from rows of its valid tokens to (guided) logits `(rows, V)`."""
    hidden = []
    for stream in streams if guidance_scale != 1 else streams[:1]:
        prompt = (tensor.to(model.device) for tensor in left_pad(stream, 0))
        hidden.append(policy.hidden_states(model, *prompt, *completion))
    _, mask = policy.ids_and_mask(*completion)

    cond, uncond = hidden if len(hidden) == 2 else (hidden[0], None)
    return [
        guided_logits(head, cond[mask[..., k]], None if uncond is None else uncond[mask[..., k]], guidance_scale)
        for k, head in enumerate(policy.heads(model))
    ]


@torch.no_grad()
def teacher_terms(
    model: Any,
    teacher: Any,
    tokenizer: Any,
    samples: Samples,
    guidance_scale: float = 3.0,
    negative_prompt: Any = None,
    temperature: float = 0.99,
    model_guidance_scale: float = 1.0,
    batch_size: int = 64,
    description: str | None = None,
) -> SequenceTerms:
    """
    KL(model || guided teacher) along the given completions, Eq. (2) of https://huggingface.co/papers/2410.06084.

    Its mean over completions that the model itself sampled at this temperature is an unbiased estimate of the KL of
    the two distributions over whole sequences.

    Args:
        model (`PreTrainedModel`): The student, a causal LM or a MusicGen.
        teacher (`PreTrainedModel`): The teacher's model, of the same vocabulary.
        tokenizer (`PreTrainedTokenizerBase`): Of both.
        samples ([`Samples`]): Prompts and completions, at least one token each.
        guidance_scale (`float`, *optional*, defaults to 3.0): gamma of the teacher.
        negative_prompt (*optional*): x^- of Eq. (1); `None` is the null prompt.
        temperature (`float`, *optional*, defaults to 0.99): T of both.
        model_guidance_scale (`float`, *optional*, defaults to 1.0): Guidance of the model itself, where it sampled
            with guidance.
        batch_size (`int`, *optional*, defaults to 64): Sequences at one time.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        [`SequenceTerms`]: Each of shape `(B,)`, float32 on the CPU.

    Raises:
        ValueError: If the vocabularies differ.
    """
    policy = policy_for(model, tokenizer)
    rows = [{"prompt": prompt} for prompt in samples.repeated_prompts]
    streams = [tokenize_prompts(policy, samples.repeated_prompts), policy.negative_prompt_ids(rows, negative_prompt)]
    model.eval(), teacher.eval()
    parts = []
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc=description, unit="batch", disable=description is None):
        part = slice(first, first + batch_size)
        completion = tuple(tensor.to(model.device) for tensor in right_pad(samples.token_ids[part]))
        inputs = [stream[part] for stream in streams], completion
        ours = completion_logits(policy, model, *inputs, model_guidance_scale)
        theirs = completion_logits(policy, teacher, *inputs, guidance_scale)
        _, mask = policy.ids_and_mask(*completion)
        sums = [_summed(ours[k], theirs[k], mask[..., k], temperature) for k in range(len(ours))]
        kl, entropy = (torch.stack(term).sum(0).cpu() for term in zip(*sums, strict=True))
        parts.append((kl, entropy, mask.sum((1, 2)).float().cpu()))
    return SequenceTerms(*(torch.cat(term) for term in zip(*parts, strict=True)))


def _summed(ours: Any, theirs: Any, mask: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and entropy of one codebook, summed over the steps of each sequence, each `(B,)`; logits exist in chunks."""
    count = int(mask.sum())
    rows = max(1, LOGITS_PER_CHUNK // ours(slice(0, 1)).shape[-1])
    kl, entropy = [], []
    for first in range(0, count, rows):
        chunk = slice(first, first + rows)
        logits = ours(chunk)
        log_p = (logits / temperature).log_softmax(-1)
        kl.append(reverse_kl(logits, theirs(chunk), temperature))
        entropy.append(-torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1))
    return sum_per_sequence(torch.cat(kl), mask[..., None]), sum_per_sequence(torch.cat(entropy), mask[..., None])
