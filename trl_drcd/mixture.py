"""
Several diversities at once: embedders with weights, whose mixture is an embedder itself.

With unit embeddings `u_k` and shares `v_k`, which add up to 1, the mixture's embedding is all `sqrt(v_k) * u_k` side
by side, of length 1. Its cosine is `sum_k v_k cos_k`, its distance `sum_k v_k d_k`: so kernels, advantages and the
critic take it as they take any embedder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_drcd.diversity import group_diversity, unit_vectors

Embed = Callable[[list[Any]], Any]


class EmbedderMixture:
    """
    Mixture of embedders, with the distance `sum_k v_k d_k`, where `v_k = (w_k / s_k) / sum_l (w_l / s_l)`.

    Args:
        embedders (`Mapping[str, Callable]`): By name; each reads the same list, and returns `(len, D_k)`. The log has
            `diversity/<name>` of each.
        weights (`Mapping[str, float]`, *optional*): `w_k`, above 0; 1 for what is not named.
        scales (`Mapping[str, float]`, *optional*): `s_k`, above 0, typical differences of each one's distances
            ([`distance_scales`]), so that none drowns another; 1 for what is not named.

    Raises:
        TypeError: If an embedder is not callable.
        ValueError: If there is none, a weight or scale is not above 0 and finite, or is of an unknown name.
    """

    def __init__(
        self,
        embedders: Mapping[str, Embed],
        weights: Mapping[str, float] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        if not embedders:
            raise ValueError("`embedder` is an empty mapping; give at least one embedder, by name")
        for name, embed in embedders.items():
            if not callable(embed):
                raise TypeError(f"`embedder[{name!r}]` must be callable with a list, got {type(embed).__name__}")
        for argument, given in (("weights", weights or {}), ("scales", scales or {})):
            if unknown := sorted(set(given) - set(embedders)):
                raise ValueError(f"`{argument}` names {unknown}; the embedders are {sorted(embedders)}")
            for name, value in given.items():
                if not (value > 0 and math.isfinite(value)):
                    raise ValueError(f"`{argument}[{name!r}]` must be finite and above 0, got {value}")
        self.embedders = dict(embedders)
        parts = {name: (weights or {}).get(name, 1.0) / (scales or {}).get(name, 1.0) for name in embedders}
        self.shares = {name: part / sum(parts.values()) for name, part in parts.items()}
        self.sizes: dict[str, int] = {}  # D_k, known after the first call

    @torch.no_grad()
    def __call__(self, inputs: list[Any]) -> torch.Tensor:
        """
        Embeddings `(len(inputs), sum_k D_k)`, float32 at least, each of length 1.

        A vector without direction (zero, infinite or NaN) makes a row that is NaN, which the diversity reward refuses.

        Raises:
            ValueError: If an embedder does not return one vector for each input.
        """
        parts = []
        for name, embed in self.embedders.items():
            vectors = torch.as_tensor(embed(inputs)).detach()
            if vectors.ndim != 2 or len(vectors) != len(inputs):
                raise ValueError(
                    f"`embedder[{name!r}]` must return shape ({len(inputs)}, D) for {len(inputs)} completions, got "
                    f"{tuple(vectors.shape)}"
                )
            vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            self.sizes[name] = vectors.shape[1]
            parts.append(math.sqrt(self.shares[name]) * unit_vectors(vectors))
        return torch.cat([part.to(parts[0]) for part in parts], dim=1)

    def diversities(self, embeddings: torch.Tensor, num_generations: int) -> dict[str, float]:
        """
        Mean diversity under each embedder, by name, of what the mixture embedded.

        Args:
            embeddings (`torch.Tensor`): Shape `(B, sum_k D_k)`, groups of one prompt contiguous.
            num_generations (`int`): Group size `G`.
        """
        parts = embeddings.split([self.sizes[name] for name in self.embedders], dim=1)
        return {
            name: float(group_diversity(part, num_generations).mean())
            for name, part in zip(self.embedders, parts, strict=True)
        }


def distance_scales(embedders: Mapping[str, Embed], inputs: Sequence[Any]) -> dict[str, float]:
    """
    Standard deviation of the cosine distances between all pairs of `inputs`, by embedder: the `scales` of a mixture.

    Args:
        embedders (`Mapping[str, Callable]`): By name.
        inputs (`Sequence`): At least three completions of the base, as the embedders read them.

    Raises:
        ValueError: If there are fewer than three, or an embedder finds all of them equally far apart.
    """
    if len(inputs) < 3:
        raise ValueError(f"`inputs` must hold at least 3 completions, got {len(inputs)}")
    rows, columns = torch.triu_indices(len(inputs), len(inputs), offset=1)
    scales = {}
    for name, embed in embedders.items():
        unit = torch.nn.functional.normalize(torch.as_tensor(embed(list(inputs))).detach().double(), dim=-1)
        scales[name] = float((unit @ unit.mT)[rows, columns].std())
        if not scales[name] > 1e-9:
            raise ValueError(f"`embedders[{name!r}]` finds all `inputs` equally far apart; give other completions")
    return scales


def as_embedder(embedder: Any) -> Any:
    """A mapping of embedders as their mixture with equal weights; anything else as it is."""
    return EmbedderMixture(embedder) if isinstance(embedder, Mapping) else embedder
