"""Convert ratings to pairwise comparisons, and count failed attention checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rating = Mapping[str, Any]


@dataclass(frozen=True)
class Comparisons:
    """
    `N` pairwise comparisons of `M` models.

    Args:
        models (`list[str]`): Names of the `M` models.
        a, b (`np.ndarray`): Indices of the two models, int, shape `(N,)`.
        outcome (`np.ndarray`): 1 if A won, 0 if B won, 0.5 for a tie; shape `(N,)`.
        prompt, rater, item (`np.ndarray`): Indices of prompt, rater and item, int, shape `(N,)`.
    """

    models: list[str]
    a: np.ndarray
    b: np.ndarray
    outcome: np.ndarray
    prompt: np.ndarray
    rater: np.ndarray
    item: np.ndarray

    def __len__(self) -> int:
        return len(self.outcome)


def scores_of(rating: Rating) -> tuple[int, int] | None:
    """Quality scores of A and B, independent of the sides shown; `None` for diversity."""
    if rating["score_left"] is None:
        return None
    left, right = rating["score_left"], rating["score_right"]
    return (left, right) if rating["a_left"] else (right, left)


def advantage_of(rating: Rating) -> int:
    """Advantage of A over B: difference of quality scores, -4 to 4, or the diversity preference, -2 to 2."""
    if scores := scores_of(rating):
        return scores[0] - scores[1]
    towards_right = rating["preference"] - 3
    return -towards_right if rating["a_left"] else towards_right


def comparisons_of(ratings: Iterable[Rating], question: str, models: Sequence[str]) -> Comparisons:
    """
    The comparisons of one question.

    Args:
        ratings (`Iterable[Mapping]`): See [`~trl_drcd.ratings.store.Study.ratings`]; attention checks are left out.
        question (`str`): `"quality"` or `"diversity"`.
        models (`Sequence[str]`): Names of the models, in the order of the tables.

    Returns:
        [`Comparisons`]: The comparisons, possibly none.
    """
    chosen = [rating for rating in ratings if rating["question"] == question and rating["check_kind"] is None]
    raters = {name: number for number, name in enumerate(dict.fromkeys(r["pseudonym"] for r in chosen))}
    place = {name: number for number, name in enumerate(models)}
    return Comparisons(
        list(models),
        np.array([place[r["model_a"]] for r in chosen], dtype=int),
        np.array([place[r["model_b"]] for r in chosen], dtype=int),
        np.array([(1 + np.sign(advantage_of(r))) / 2 for r in chosen], dtype=float),
        np.array([r["prompt"] for r in chosen], dtype=int),
        np.array([raters[r["pseudonym"]] for r in chosen], dtype=int),
        np.array([r["item"] for r in chosen], dtype=int),
    )


def failed(rating: Rating) -> bool:
    """
    Whether an attention check was failed: identical sides rated more than one point apart, or a degraded side not
    rated worse.
    """
    advantage = advantage_of(rating)
    return abs(advantage) > 1 if rating["check_kind"] == "same" else advantage <= 0


def attention(ratings: Iterable[Rating]) -> dict[str, tuple[int, int]]:
    """For each pseudonym, the number of failed attention checks and of all."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for rating in ratings:
        failures = counts[rating["pseudonym"]]
        if rating["check_kind"] is not None:
            failures.append(failed(rating))
    return {name: (sum(failures), len(failures)) for name, failures in counts.items()}


def inattentive(ratings: Iterable[Rating], most_failed: float = 0.5) -> list[str]:
    """Pseudonyms of the raters who failed more than the share `most_failed` of their checks."""
    return [name for name, (bad, all_) in attention(ratings).items() if all_ and bad / all_ > most_failed]
