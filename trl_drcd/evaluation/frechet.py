"""
Fréchet distance of samples to held-out recordings in a judge's embedding space, with an estimate of its bias.

Letters: `N` clips, `P` prompts, `D` embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from trl_drcd.evaluation.statistics import Interval, percentile_interval, times_drawn
from trl_drcd.files import write_bytes
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.saved_files import open_safetensors


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """
    Fréchet distance (squared, as usual) of two normal distributions: `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`.

    Args:
        mean, other_mean (`np.ndarray`): Shape `(D,)`.
        covariance, other_covariance (`np.ndarray`): Shape `(D, D)`, symmetric, positive semi-definite.

    Returns:
        `float`: In squared units of the embeddings.
    """
    return _distance(mean, covariance, other_mean, other_covariance, _root(other_covariance))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray, root: np.ndarray
) -> float:
    # C1 C2 has the eigenvalues of the symmetric C2^(1/2) C1 C2^(1/2)
    product = np.linalg.eigvalsh(root @ covariance @ root).clip(min=0)
    traces = np.trace(covariance) + np.trace(other) - 2 * np.sqrt(product).sum()
    return float(((mean - other_mean) ** 2).sum() + traces)


@dataclass
class Reference:
    """
    Mean and covariance of the embeddings of held-out recordings.

    Args:
        mean (`np.ndarray`): Shape `(D,)`.
        covariance (`np.ndarray`): Shape `(D, D)`.
        clips (`int`): Number of recordings.
        judge (`str`): [`~trl_drcd.evaluation.digests.content_digest`] of the judge that embedded them.
    """

    mean: np.ndarray
    covariance: np.ndarray
    clips: int
    judge: str

    @classmethod
    def of(cls, embeddings: np.ndarray, judge: str) -> Reference:
        """Mean and covariance of embeddings of shape `(N, D)`, `N` at least 2."""
        embeddings = np.asarray(embeddings, dtype=np.float64)
        return cls(embeddings.mean(0), np.cov(embeddings, rowvar=False), len(embeddings), judge)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, float32."""
        tensors = {"mean": self.mean.astype(np.float32), "covariance": self.covariance.astype(np.float32)}
        write_bytes(file, save(tensors, {"clips": str(self.clips), "judge": self.judge}))

    @classmethod
    def load(cls, file: str | Path, judge: str | None = None) -> Reference:
        """
        Read a file written by [`save`].

        Args:
            file (`str` or `Path`): The safetensors file.
            judge (`str`, *optional*): Digest that the file's judge must have; not checked if `None`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it was made with another judge or other weights, or is not a readable safetensors file.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"`reference={file}` is not a file; recipes/tiny_music/build/reference.py shows how to write one"
            )
        with prefix_errors("reference"):
            open_safetensors(Path(file))
        with safe_open(file, "numpy") as content:
            about = content.metadata() or {}
            if judge is not None and about.get("judge") != judge:
                raise ValueError(
                    f"`reference={file}` was made with the judge {about.get('judge')}, but `judge` is {judge} "
                    "(digests); make it again, e.g. with recipes/tiny_music/build/reference.py"
                )
            mean, covariance = (content.get_tensor(name).astype(np.float64) for name in ("mean", "covariance"))
        return cls(mean, covariance, int(about["clips"]), about["judge"])


def frechet_to_reference(
    embeddings: np.ndarray, samples_per_prompt: int, reference: Reference, resamples: int = 200, seed: int = 0
) -> dict[str, Interval]:
    """
    Fréchet distance of samples to the reference, with its bootstrap interval over prompts and an estimate of its bias.

    With few samples the distance is biased upwards, more so in more dimensions. `frechet_floor` estimates that bias:
    it is the distance of `N` independent draws from the reference's own normal distribution, whose true distance is 0.
    Samples of the same prompt are not independent, so the floor is a lower bound of the bias. Compare distances only
    at equal numbers of prompts and samples.

    A bootstrap sample repeats prompts, which increases the distance further; the interval is shifted back by the mean
    of that excess.

    Args:
        embeddings (array): Shape `(N, D)`, the samples of one prompt contiguous.
        samples_per_prompt (`int`): Divides `N`.
        reference ([`Reference`]): Statistics of the recordings.
        resamples (`int`, *optional*, defaults to 200): Bootstrap draws.
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.

    Returns:
        `dict`: `frechet` and `frechet_floor`, each with `mean`, `low`, `high`, in squared units of the embeddings.

    Raises:
        ValueError: If `D` is not the reference's.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    size = len(reference.mean)
    if embeddings.shape[1] != size:
        raise ValueError(f"`embeddings` have {embeddings.shape[1]} dimensions, the reference has {size}")
    root = _root(reference.covariance)

    def to_reference(mean: np.ndarray, covariance: np.ndarray) -> float:
        return _distance(mean, covariance, reference.mean, reference.covariance, root)

    groups = embeddings.reshape(-1, samples_per_prompt, size)
    sums, products = groups.sum(1), np.einsum("pgi,pgj->pij", groups, groups)
    count = len(embeddings)
    distances = []
    for times in times_drawn(len(groups), resamples, seed):
        mean = times @ sums / count
        second = np.tensordot(times, products, 1)
        distances.append(to_reference(mean, (second - count * np.outer(mean, mean)) / (count - 1)))
    own = np.random.default_rng(seed).standard_normal((20, count, size)) @ root + reference.mean
    floors = [to_reference(one.mean(0), np.cov(one, rowvar=False)) for one in own]
    low, high = np.quantile(floors, [0.025, 0.975])
    return {
        "frechet": percentile_interval(distances, centred=True),
        "frechet_floor": {"mean": float(np.mean(floors)), "low": float(low), "high": float(high)},
    }
