"""
The table of all metrics: key, label, unit, which direction is better, and how each is measured.

`results.jsonl`, CSV, tables, plots and pages use this table; to add a metric, add an entry to [`METRICS`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch

from trl_drcd.evaluation.frechet import frechet_to_reference
from trl_drcd.evaluation.judging import EMBEDDER_OF, Judges, RewardFunction, embed_all
from trl_drcd.evaluation.likelihood import SequenceTerms
from trl_drcd.evaluation.sampling import Completion, Samples
from trl_drcd.evaluation.statistics import Interval, bootstrap_interval
from trl_drcd.evaluation.variety import (
    distinct_2,
    diversity_between_prompts,
    diversity_within_prompts,
    per_prompt,
    self_bleu,
)


@dataclass
class Drawn:
    """
    The samples of a row with their judges; intermediate results that several metrics need are cached.

    Args:
        samples ([`Samples`]): Prompts and token ids.
        completions (`list`): The same samples decoded to text or audio.
        judges ([`Judges`]): Models and functions that score them.
        seed (`int`, *optional*, defaults to 0): Random seed of bootstraps.
        score (`Callable`, *optional*): Returns KL to the teacher and entropy of each sample, or of the first of each
            prompt.
        inform (`Callable`, *optional*): Returns the pointwise mutual information of each sample and its prompt under
            the base, nats, `(B,)`.
    """

    samples: Samples
    completions: list[Completion]
    judges: Judges
    seed: int = 0
    score: Callable[[], SequenceTerms] | None = None
    inform: Callable[[], torch.Tensor] | None = None
    _embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def texts(self) -> list[str]:
        """The completions that are text; empty for audio."""
        return [item for item in self.completions if isinstance(item, str)]

    @cached_property
    def terms(self) -> SequenceTerms | None:
        """What `score` returns; `None` without it."""
        return self.score and self.score()

    @cached_property
    def frechet(self) -> dict[str, Interval]:
        """The Fréchet distance to the judge's reference and its floor; empty without a reference."""
        judges = self.judges
        if judges.hear is None or judges.reference is None:
            return {}
        heard = judges.hear(self.completions).double().numpy()
        return frechet_to_reference(heard, self.samples.samples_per_prompt, judges.reference, seed=self.seed)

    def embeddings(self, name: str) -> torch.Tensor | None:
        """Embeddings `(B, D)` from the embedder called `name`; `None` if there is none."""
        embed = self.judges.embedders.get(name)
        if embed is not None and name not in self._embeddings:
            self._embeddings[name] = embed_all(EMBEDDER_OF.get(name, name), embed, self.completions)
        return self._embeddings.get(name)

    def of_prompts(self, values: torch.Tensor | list[float]) -> np.ndarray:
        """Average values of as many samples of each prompt, `(P * n,)`, over each prompt, `(P,)`."""
        return per_prompt(values, len(values) // len(self.samples.prompts))


Measured = np.ndarray | Interval | None
"""One value per prompt, `(P,)`; or one value for all prompts with its interval; `None` if it is not measured."""


@dataclass(frozen=True)
class Metric:
    """
    A metric.

    Args:
        key (`str`): Its name in `results.jsonl`.
        label (`str`): Its name in tables and plots.
        unit (`str`, *optional*): Unit of its values; empty if dimensionless.
        better (`str`, *optional*): `"higher"` or `"lower"`; `None` if neither.
        measure (`Callable`, *optional*): Measures it on a row's samples; `None` if it is derived from other metrics.
        role (`str`, *optional*): `"quality"` or `"diversity"` if it is an axis of the fronts.
        column (`bool`, *optional*, defaults to `True`): Whether it is a column of the report's table.
    """

    key: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    measure: Callable[[Drawn], Measured] | None = None
    role: Literal["quality", "diversity"] | None = None
    column: bool = True

    @property
    def heading(self) -> str:
        """Label and unit, for columns and axes."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


# ---------------------------------------------------------------- measurement of each


def _within(drawn: Drawn, embedder: str) -> Measured:
    embeddings = drawn.embeddings(embedder)
    return None if embeddings is None else diversity_within_prompts(embeddings, drawn.samples.samples_per_prompt)


def _between(drawn: Drawn, embedder: str) -> Measured:
    embeddings = drawn.embeddings(embedder)
    count = drawn.samples.samples_per_prompt
    return None if embeddings is None else diversity_between_prompts(embeddings, count, drawn.seed)


def _adherence(drawn: Drawn, judge: str) -> Measured:
    adherence = drawn.judges.adherence.get(judge)
    return adherence and drawn.of_prompts(adherence(drawn.samples.repeated_prompts, drawn.completions))


def _preference(drawn: Drawn) -> Measured:
    preference = drawn.judges.preference
    return preference and drawn.of_prompts(preference(drawn.completions))


def _reward(drawn: Drawn, function: RewardFunction) -> Measured:
    name = getattr(function, "__name__", repr(function))
    try:
        values = function(prompts=drawn.samples.repeated_prompts, completions=drawn.completions)
    except Exception as error:
        raise RuntimeError(f"metric `{name}` raised {type(error).__name__}: {error}") from error
    if values is None or len(values) != len(drawn.completions):
        got = "`None`" if values is None else f"{len(values)} values"
        raise ValueError(f"metric `{name}` gave {got} for {len(drawn.completions)} completions")
    judged = np.array([np.nan if value is None else float(value) for value in values])  # `None`: not judged, as in TRL
    grouped = judged.reshape(len(drawn.samples.prompts), -1)
    counts = (~np.isnan(grouped)).sum(1)
    return np.where(counts > 0, np.nansum(grouped, 1) / np.maximum(counts, 1), np.nan)


def _information(drawn: Drawn) -> Measured:
    return drawn.inform and drawn.of_prompts(drawn.inform())


def _kl(drawn: Drawn) -> Measured:
    return drawn.terms and drawn.of_prompts(drawn.terms.kl)


def _entropy(drawn: Drawn) -> Measured:
    return drawn.terms and drawn.of_prompts(drawn.terms.entropy / drawn.terms.tokens)


def _frechet(drawn: Drawn) -> Measured:
    return drawn.frechet.get("frechet")


def _frechet_floor(drawn: Drawn) -> Measured:
    return drawn.frechet.get("frechet_floor")


def _distinct_2(drawn: Drawn) -> Measured:
    return distinct_2(drawn.texts, drawn.samples.samples_per_prompt) if drawn.texts else None


def _self_bleu(drawn: Drawn) -> Measured:
    return self_bleu(drawn.texts, drawn.samples.samples_per_prompt) if drawn.texts else None


def _speed(drawn: Drawn) -> Measured:
    speed = drawn.samples.tokens_per_second
    return {"mean": speed, "low": speed, "high": speed}


METRICS: tuple[Metric, ...] = (
    Metric("quality", "quality", better="higher", role="quality"),  # derived, see `with_quality`
    Metric("adherence", "text adherence", "cosine", "higher", partial(_adherence, judge="adherence"), "quality"),
    Metric("adherence_clap", "adherence by CLAP", "cosine", "higher", partial(_adherence, judge="adherence_clap")),
    Metric("adherence_cross_encoder", "adherence by the cross-encoder", better="higher",
           measure=partial(_adherence, judge="adherence_cross_encoder")),
    Metric("preference", "preference", "nats", "higher", _preference),
    Metric("prompt_information", "information on the prompt", "nats", "higher", _information, "quality"),
    Metric("diversity", "diversity", "1 - cosine", "higher", partial(_within, embedder="diversity"), "diversity"),
    Metric("diversity_between_prompts", "its upper bound", measure=partial(_between, embedder="diversity")),
    Metric("diversity_second", "diversity, second embedding", "1 - cosine", "higher",
           partial(_within, embedder="diversity_second"), "diversity"),
    Metric("diversity_second_between_prompts", "its upper bound, second embedding", column=False,
           measure=partial(_between, embedder="diversity_second")),
    Metric("entropy_per_token", "entropy", "nats per token", measure=_entropy),
    Metric("kl", "KL to the guided teacher", "nats", "lower", _kl),
    Metric("frechet", "Fréchet distance", better="lower", measure=_frechet),
    Metric("frechet_floor", "floor of the Fréchet distance", measure=_frechet_floor, column=False),
    Metric("distinct_2", "distinct-2", better="higher", measure=_distinct_2),
    Metric("self_bleu", "self-BLEU", better="lower", measure=_self_bleu),
    Metric("tokens_per_second", "tokens per second", better="higher", measure=_speed, column=False),
)  # fmt: skip


# ---------------------------------------------------------------- queries of the table


def metric(key: str) -> Metric:
    """The metric with that key; a user's own metric is labelled with its key."""
    return next((known for known in METRICS if known.key == key), Metric(key, key.replace("_", " "), better="higher"))


def in_order(keys: Iterable[str]) -> list[Metric]:
    """The metrics with these keys in the order of the table, followed by a user's own."""
    given = dict.fromkeys(keys)
    known = [one for one in METRICS if one.key in given]
    return [*known, *(metric(key) for key in given if key not in {one.key for one in known})]


def axes(keys: Iterable[str], role: Literal["quality", "diversity"]) -> list[str]:
    """Those of `keys` that are axes of the fronts in the given role."""
    return [one.key for one in in_order(keys) if one.role == role]


def measured(drawn: Drawn) -> Iterator[tuple[str, np.ndarray | Interval]]:
    """Key and value of every metric that can be measured on the samples, including a user's rewards."""
    rewards = [Metric(key, key, measure=partial(_reward, function=f)) for key, f in drawn.judges.rewards.items()]
    for one in [*METRICS, *rewards]:
        value = one.measure(drawn) if one.measure else None
        if value is not None:
            yield one.key, value


def measure(drawn: Drawn) -> tuple[dict[str, Interval], dict[str, np.ndarray]]:
    """
    Measure every metric.

    Args:
        drawn ([`Drawn`]): Samples and judges.

    Returns:
        `tuple`: Every metric with its interval, and the values per prompt, `(P,)`, of those that have them.

    Raises:
        ValueError: If a metric does not have one value per prompt.
    """
    values = dict(measured(drawn))
    by_prompt = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    for key, value in by_prompt.items():
        if value.shape != (len(drawn.samples.prompts),):
            raise ValueError(
                f"metric `{key}` has shape {value.shape}; expected one value for each of the "
                f"{len(drawn.samples.prompts)} prompts"
            )
    intervals = {k: bootstrap_interval(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return intervals, by_prompt
