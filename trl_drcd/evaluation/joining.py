"""
Rows of several `results.jsonl` as one evaluation: with further samples of a row, further trainings of a point, rows of
their own, or further prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trl_drcd.evaluation.results import Result, read_results, rounded
from trl_drcd.evaluation.statistics import bootstrap_interval

RESULTS_HELP = (
    "results.jsonl, and others of the same prompts, with further rows, further samples of a row (`trl-drcd evaluate "
    "--seed 1`), or further trainings (`first_training_seed` of a strategy)"
)
FURTHER_PROMPTS_HELP = (
    "the same rows on other prompts: a results.jsonl and, as above, others of its prompts; rows that only one set of "
    "prompts has are left out"
)
"""Help of scripts that read several files, and of those that join prompts."""
SETTINGS = (
    "point", "model", "weights", "guidance_scale", "temperature", "early_steps", "early_guidance_scale", "checkpoint",
    "negative_prompt", "teacher_negative_prompt", "teacher_guidance_scale", "prompts", "samples_per_prompt", "kind",
)  # fmt: skip
"""What rows that differ only in their samples have in common."""
COMPARABLE = ("teacher_negative_prompt", "teacher_guidance_scale", "prompts", "kind")
"""What rows that can be compared have in common."""
SHOWN = 5  # names of rows in a warning
logger = logging.getLogger(__name__)


def read_joined(file: str | Path, *more: str | Path, further_prompts: Sequence[str | Path] = ()) -> list[Result]:
    """
    Read all lines of a `results.jsonl`, and join those of others with them.

    Args:
        file (`str` or `Path`): A `results.jsonl`.
        more (`str` or `Path`): Others, of the same prompts: with rows of their own, with further samples of a row of
            the first (`trl-drcd evaluate --seed 1`), or with further trainings of its points (`first_training_seed`).
        further_prompts (`Sequence[str | Path]`, *optional*): A file with the same rows on other prompts, and more.

    Returns:
        `list[Result]`: The lines of the first file, then the other rows; a row that several have is [`joined`]. With
        `further_prompts`, [`on_both`].

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the first file has no rows, a line is not a result, or a row of another file cannot be compared
            with the first's.
    """
    if further_prompts:
        return on_both(read_joined(file, *more), read_joined(*further_prompts))
    rows, *others = map(read_results, (file, *more))
    if not rows:
        raise ValueError(f"{file} has no rows")
    if not others:
        return rows
    drawn, untold = {name: [row] for name, row in _by_name(file, rows).items()}, list[str]()
    for file_of, row in ((name, row) for name, further in zip(more, others, strict=True) for row in further):
        if row.name in drawn:
            drawn[row.name].append(row)
            continue
        trainings = [each[0] for each in drawn.values() if each[0].point == row.point]
        if trainings:
            _check_further_training(row, trainings)
        first = (trainings or rows or [row])[0]
        what = f"{row.name} in {file_of}"
        _check_settings(first, row, what, COMPARABLE)
        if not _of_the_same_prompts(first, row, what, "but_model" if trainings else "but_row"):
            untold.append(row.name)
        drawn[row.name] = [_without_other_quality(row, first)]
    if untold:
        logger.warning(
            f"{untold[0]} and {len(untold) - 1} others: rows of an earlier version do not tell whether their prompts "
            "are the same, and are taken to be on the same"
        )
    return [joined(each) for each in drawn.values()]


def _check_further_training(row: Result, trainings: Sequence[Result]) -> None:
    """
    Refuse a row that is not another training of the point of `trainings`.

    Raises:
        ValueError: If it was sampled or measured otherwise, or is one of the `trainings` under another number.
    """
    first = trainings[0]
    if None in (row.training_seed, first.training_seed):
        raise ValueError(f"{row.name} is of the point of {first.name}, but one of them has no number of its training")
    _check_settings(first, row, "further trainings", sorted({*SETTINGS, "diversity_coef"} - {"model"}))
    for other in trainings:
        digests = other.model_digest, row.model_digest
        same_model = (other.model, other.weights) == (row.model, row.weights)
        if same_model if None in digests else digests[0] == digests[1]:
            raise ValueError(f"{row.name} is the model of {other.name} once more; leave one of them out")


def _of_the_same_prompts(first: Result, row: Result, what: str, digest: str) -> bool:
    """
    Whether the rows tell by a digest that base, prompts, lengths, dtype and judges are the same.

    Raises:
        ValueError: If they tell that these are not.
    """
    one, other = getattr(first, digest), getattr(row, digest)
    if None not in (one, other) and one != other:
        raise ValueError(
            f"{what} must have the base, prompts, judges, lengths and dtype of {first.name}, but the digests "
            f"`{digest}` differ: {one}, {other}"
        )
    return None not in (one, other)


def _without_other_quality(row: Result, first: Result) -> Result:
    """The row; without `quality` if its weights of the terms are not the first's."""
    if row.omega == first.omega:
        return row
    metrics = {name: one for name, one in row.metrics.items() if name != "quality"}
    return replace(
        row, metrics=metrics, per_prompt={name: one for name, one in row.per_prompt.items() if name != "quality"}
    )


def joined(rows: Sequence[Result]) -> Result:
    """
    A row with further samples of the same prompts: for each prompt the mean of what was measured of each.

    A diversity within prompts thus counts pairs of samples that were drawn together, not pairs across. Metrics without
    values per prompt, such as a Fréchet distance, whose bias depends on the number of samples, are those of the first.

    Args:
        rows (`list[Result]`): The same row, sampled with different seeds.

    Returns:
        `Result`: As the first, with all samples; itself if it is alone.

    Raises:
        ValueError: If the rows differ in more than their samples, or two have samples of the same seed.
    """
    first, *others = rows
    if not others:
        return first
    for row in others:
        _check_settings(first, row, "further samples", SETTINGS)
    digests = [row.but_seed for row in rows]
    if len({*digests} - {None}) > 1:
        raise ValueError(
            f"{first.name}: further samples must have the same prompts, model, judges and lengths, but the digests of "
            f"these differ: {digests}"
        )
    if None in digests:
        logger.warning(f"{first.name}: rows of an earlier version do not tell whether their prompts are the same")
    if len({row.seed for row in rows}) < len(rows):
        raise ValueError(
            f"{first.name}: further samples must have another `seed`, got {[row.seed for row in rows]}; if these are "
            "the same samples, leave the row out of one of the files"
        )
    other_quality = {"quality"} if len({row.omega for row in rows}) > 1 else set()
    keys = [
        key for key in first.per_prompt if all(key in row.per_prompt for row in others) and key not in other_quality
    ]
    values = {key: _mean([row.per_prompt[key] for row in rows]) for key in keys}
    return replace(
        first,
        samples_per_prompt=first.samples_per_prompt * len(rows),
        metrics={
            key: bootstrap_interval(values[key]) if key in values else one
            for key, one in first.metrics.items()
            if key in values or key not in first.per_prompt
        },
        per_prompt={key: rounded(one) for key, one in values.items()},
    )


def _check_settings(first: Result, row: Result, what: str, settings: Sequence[str]) -> None:
    if unlike := next((name for name in settings if getattr(row, name) != getattr(first, name)), None):
        one, other = getattr(first, unlike), getattr(row, unlike)
        raise ValueError(f"{first.name}: {what} must have the same `{unlike}`, got {one!r} and {other!r}")


def _mean(values: Sequence[Sequence[float]]) -> np.ndarray:
    """The mean of values `(R, P)` over `R`, without those that are NaN."""
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def on_both(rows: Sequence[Result], further: Sequence[Result]) -> list[Result]:
    """
    Rows on two sets of prompts: those that both have, by name, with the values per prompt of both in a row.

    Rows that only one of them has are left out, and a warning tells so, since points are compared on the same prompts.
    Metrics without values per prompt are left out too.

    Args:
        rows (`Sequence[Result]`): On the first prompts.
        further (`Sequence[Result]`): On the others.

    Returns:
        `list[Result]`: In the order of `rows`.

    Raises:
        ValueError: If no row is in both, a name occurs twice, or a row has other settings, or the same prompts.
    """
    first, second = _by_name("the first set of prompts", rows), _by_name("the other set of prompts", further)
    if not (shared := [name for name in first if name in second]):
        raise ValueError(f"no row has further prompts: {list(first)} and {list(second)} have no name in common")
    if alone := [name for name in (*first, *second) if name not in shared]:
        more = f" and {len(alone) - SHOWN} others" if len(alone) > SHOWN else ""
        some = ", ".join(alone[:SHOWN])
        logger.warning(f"left out, for they are on one of the two sets of prompts only: {some}{more}")
    if any(None in (first[name].but_prompts, second[name].but_prompts) for name in shared):
        logger.warning("rows of an earlier version do not tell whether judges, lengths and dtype are the same")
    return [_on_both(first[name], second[name]) for name in shared]


def _by_name(where: str | Path, rows: Sequence[Result]) -> dict[str, Result]:
    names = [row.name for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{where} has two rows {twice}, so it is not clear to which of them another belongs")
    return dict(zip(names, rows, strict=True))


def _on_both(first: Result, other: Result) -> Result:
    _check_settings(first, other, "further prompts", sorted({*SETTINGS, "diversity_coef"} - {"prompts"}))
    for digest in ("but_prompts", "model_digest"):
        digests = getattr(first, digest), getattr(other, digest)
        if None not in digests and digests[0] != digests[1]:
            raise ValueError(
                f"{first.name}: further prompts must have the same model, base, judges, lengths and dtype, but the "
                f"digests `{digest}` differ: {digests[0]}, {digests[1]}"
            )
    if {first.but_row, first.settings} & {other.but_row, other.settings} - {None, ""}:
        raise ValueError(f"{first.name}: further prompts must be others, but these are the same")
    other = _without_other_quality(other, first)
    values = {key: [*one, *other.per_prompt[key]] for key, one in first.per_prompt.items() if key in other.per_prompt}
    return replace(
        first,
        prompts=first.prompts + other.prompts,
        metrics={key: bootstrap_interval(one) for key, one in values.items() if key in first.metrics},
        per_prompt=values,
    )
