"""The report of a study: `report.md`, `report.json`, figures, and all ratings as CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.evaluation.statistics import Interval, percentile_interval
from trl_drcd.evaluation.tables import Table, formatted, markdown, verdict
from trl_drcd.files import write_text
from trl_drcd.ratings import figures
from trl_drcd.ratings.comparisons import Comparisons, attention, comparisons_of, inattentive, scores_of
from trl_drcd.ratings.correlations import correlations, metric_values
from trl_drcd.ratings.design import QUESTIONS
from trl_drcd.ratings.power import power_of, ratings_needed
from trl_drcd.ratings.samples import read_evaluation
from trl_drcd.ratings.statistics import (
    agreement,
    bradley_terry_scores,
    crossed,
    design_effect,
    draw_weights,
    krippendorff_alpha,
    named,
    win_and_tie_counts,
    win_rate_intervals,
)
from trl_drcd.ratings.store import Study
from trl_drcd.ratings.tabular import ratings_csv
from trl_drcd.validation.field_types import check_types

PAPERS_WIN_RATE = 0.57


@dataclass
class ReportArguments:
    """Arguments of `trl-drcd ratings report`."""

    study: str = field(metadata={"help": "Folder of the study."})
    out: str | None = field(default=None, metadata={"help": "Folder to write; report/ in the study if not given."})
    evaluation: str | None = field(
        default=None, metadata={"help": "Folder of the evaluation, if it was moved after the design."}
    )
    most_failed: float = field(
        default=0.5, metadata={"help": "Exclude raters who failed more than this share of their attention checks."}
    )
    draws: int = field(default=1000, metadata={"help": "Bootstrap draws of prompts and raters."})
    seed: int = field(default=0, metadata={"help": "Random seed of the draws."})

    def __post_init__(self) -> None:
        check_types(self)
        if self.draws < 100:
            raise ValueError(f"`draws` must be at least 100, got {self.draws}")
        if not 0 <= self.most_failed <= 1:
            raise ValueError(f"`most_failed` must be between 0 and 1, got {self.most_failed}")


def write_report(arguments: ReportArguments) -> dict[str, Any]:
    """
    Analyse the ratings of a study and write its report.

    Args:
        arguments ([`ReportArguments`]): The study and settings of the analysis.

    Returns:
        `dict`: Contents of `report.json`.

    Raises:
        FileNotFoundError: If the study, or a given `evaluation`, does not exist.
        ValueError: If there are no ratings, or none by raters who passed the attention checks.
    """
    study = Study(arguments.study)
    ratings = study.ratings()
    if not ratings:
        raise ValueError(
            f"`study={arguments.study}` has no ratings yet; rate with `trl-drcd app --tabs rate --study "
            f"{arguments.study}`"
        )
    out = Path(arguments.out) if arguments.out else study.folder / "report"
    left_out = inattentive(ratings, arguments.most_failed)
    kept = [rating for rating in ratings if rating["pseudonym"] not in left_out]
    metrics, note = measured(study, arguments.evaluation)
    result: dict[str, Any] = {
        "simulated": study.simulated,
        "models": study.about["models"],
        "ratings": len(ratings),
        "raters": len({rating["pseudonym"] for rating in ratings}),
        "left_out": len(left_out),
        "checks_failed": [sum(column) for column in zip(*attention(ratings).values(), strict=True)],
        "note": note,
        "questions": {},
    }
    for question in QUESTIONS:
        comparisons = comparisons_of(kept, question, study.about["models"])
        if len(comparisons):
            result["questions"][question] = analysed(comparisons, metrics, arguments)
    if scores := [rating for rating in kept if scores_of(rating) and rating["check_kind"] is None]:
        result["questions"]["quality"] |= score_summary(scores, study.about["models"])
    if not result["questions"]:
        raise ValueError(
            f"`study={arguments.study}` has no ratings by raters who passed their attention checks; see `most_failed`"
        )
    write_text(out / "ratings.csv", ratings_csv(study))
    write_text(out / "report.json", json.dumps(result, indent=1) + "\n")
    figures.save_figures(figures_of(result, study), out)
    write_text(out / "report.md", report_markdown(result))
    return result


def measured(study: Study, folder: str | None) -> tuple[dict[str, np.ndarray], str]:
    """The metrics of the study's evaluation, `(M, P)` each, and a note if they cannot be read."""
    try:
        evaluation = read_evaluation(folder or study.about["evaluation"])
        study.check_prompts(evaluation.prompts)
        study.check_samples({result.name: result.but_judges for result in evaluation.results})
        return metric_values(evaluation.results, study.about["models"], len(evaluation.prompts)), ""
    except (FileNotFoundError, KeyError, ValueError) as error:
        if folder:
            raise
        return {}, f"The metrics of the evaluation could not be read: {error}"


def analysed(
    comparisons: Comparisons, metrics: Mapping[str, np.ndarray], arguments: ReportArguments
) -> dict[str, Any]:
    """Analysis of one question: win rates, scores, agreement, correlations, power."""
    weights = draw_weights(comparisons, arguments.draws, arguments.seed)
    wins, ties = win_and_tie_counts(comparisons, np.ones((1, len(comparisons))))
    scores = crossed(lambda of: bradley_terry_scores(comparisons, of), weights)
    effect = design_effect(comparisons, weights)
    share = float((comparisons.outcome == 0.5).mean())
    pairs = (wins + wins.transpose(0, 2, 1) + ties)[0]
    per_pair = int(np.median(pairs[np.triu_indices(len(pairs), 1)]))
    return {
        "comparisons": len(comparisons),
        "per_pair": per_pair,
        "wins": wins[0].tolist(),
        "ties": ties[0].tolist(),
        "win_rates": win_rate_intervals(comparisons, weights),
        "scores": named(scores, comparisons.models),
        "alpha": agreement(comparisons, min(200, arguments.draws), arguments.seed),
        "design_effect": effect,
        "tie_share": share,
        "metrics": correlations(comparisons, weights, metrics) if metrics else {},
        "means": {metric: _means(values, comparisons.models) for metric, values in metrics.items()},
        "power": _power(effect, share, per_pair),
    }


def _means(values: np.ndarray, models: Sequence[str]) -> dict[str, Interval]:
    """Mean over the prompts that were judged of each model with its bootstrap interval, from values `(M, P)`."""
    every = np.arange(values.shape[1])[None]
    draws = np.concatenate([every, np.random.default_rng(0).integers(0, values.shape[1], (1000, values.shape[1]))])
    return {
        name: percentile_interval(np.ma.masked_invalid(row[draws]).mean(1).filled(np.nan))
        for name, row in zip(models, values, strict=True)
    }


def _power(effect: float, ties: float, per_pair: int) -> dict[str, float]:
    """Power analysis of the paper's win rate with this study's design effect and ties."""
    effect = effect if np.isfinite(effect) else 1.0
    ties = min(ties, 0.8)
    needed = ratings_needed(PAPERS_WIN_RATE, ties, design_effect=effect)
    chance = power_of(max(1, per_pair), PAPERS_WIN_RATE, ties, design_effect=effect)
    return {"win_rate": PAPERS_WIN_RATE, "ratings_needed": needed, "chance_with_these": chance}


def score_summary(ratings: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """Mean quality score (1 to 5) of each model, and Krippendorff's alpha (interval) of the scores."""
    of_model: dict[str, list[int]] = {name: [] for name in models}
    raters = {name: i for i, name in enumerate(dict.fromkeys(r["pseudonym"] for r in ratings))}
    units = {key: i for i, key in enumerate(dict.fromkeys((r["item"], side) for r in ratings for side in "ab"))}
    table = np.full((len(raters), len(units)), np.nan)
    for rating in ratings:
        for side, score in zip("ab", scores_of(rating) or (), strict=True):
            of_model[rating[f"model_{side}"]].append(score)
            table[raters[rating["pseudonym"]], units[rating["item"], side]] = score
    return {
        "mean_scores": {name: float(np.mean(scores)) for name, scores in of_model.items() if scores},
        "alpha_of_scores": krippendorff_alpha(table, "interval"),
    }


def figures_of(result: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """Figures `win_rates` (Fig. 5), `scores` (both questions) and, if diversity was rated, `diversity` (Fig. 7)."""
    questions, simulated = result["questions"], study.simulated
    tables = {
        question: np.array([[np.nan if cell is None else cell["mean"] for cell in row] for row in found["win_rates"]])
        for question, found in questions.items()
    }
    made = {
        "win_rates": figures.win_rate_figure(tables, result["models"], simulated),
        "scores": figures.score_figure(
            {f"{question}: Elo by raters": found["scores"] for question, found in questions.items()}, simulated
        ),
    }
    if "diversity" in questions:
        found = questions["diversity"]
        panels = {"diversity by E": found["means"].get("diversity"), "Elo by raters": found["scores"]}
        panels["entropy (nats/token)"] = found["means"].get("entropy_per_token")
        made["diversity"] = figures.score_figure({t: p for t, p in panels.items() if p}, simulated)
    return made


# ---------------------------------------------------------------- text


def report_markdown(result: Mapping[str, Any]) -> str:
    """Render the report in Markdown."""
    parts = ["# Ratings"]
    if result["simulated"]:
        parts.append(
            "**SIMULATED RATERS. No person has rated anything here: these numbers test the method, and say nothing "
            "about the models.**"
        )
    failed, checks = result["checks_failed"]
    parts.append(
        f"{result['ratings']} ratings by {result['raters']} {'simulated ' if result['simulated'] else ''}raters; "
        f"{failed} of {checks} attention checks failed, {result['left_out']} raters excluded. Intervals: 95 %, "
        "bootstrap over prompts, widened for the variance between raters."
    )
    parts.append("![Win rates](win_rates.png)\n\n![Scores](scores.png)")
    if "diversity" in result["questions"]:
        parts.append("![Diversity by embedding, raters and entropy](diversity.png)")
    if result["note"]:
        parts.append(str(result["note"]))
    for question, found in result["questions"].items():
        parts.append(f"## {question.capitalize()}")
        parts += [_about(found), *(markdown(table) for table in tables_of(found, result["models"]))]
    return "\n\n".join(parts) + "\n"


def _about(found: Mapping[str, Any]) -> str:
    power, undefined = found["power"], max(score["undefined_draws"] for score in found["scores"].values())
    words = [
        f"{found['comparisons']} comparisons, {found['per_pair']} per pair; {found['tie_share']:.0%} ties; "
        f"Krippendorff's alpha of the outcomes {formatted(found['alpha'], 2)}."
    ]
    if "alpha_of_scores" in found:
        words.append(f"Krippendorff's alpha of the scores {found['alpha_of_scores']:.2f}.")
    words.append(
        f"Detecting a win rate of {power['win_rate']:g} would take {power['ratings_needed']} ratings per pair (80 % "
        f"power, design effect {found['design_effect']:.2f}); {found['per_pair']} have a power of "
        f"{power['chance_with_these']:.0%}."
    )
    if undefined:
        words.append(f"In {undefined:.1%} of the draws a model won or lost everything; these have no finite scores.")
    return " ".join(words)


def tables_of(found: Mapping[str, Any], models: Sequence[str]) -> list[Table]:
    """Scores, win rates and correlations of one question."""
    means = found.get("mean_scores", {})
    scores = [[name, formatted(found["scores"][name], 0)] for name in models]
    if means:
        scores = [[*row, f"{means[row[0]]:.2f}" if row[0] in means else ""] for row in scores]
    rates = [
        [a, *("" if cell is None else f"{formatted(cell, 2)} {_word(cell)}".strip() for cell in row)]
        for a, row in zip(models, found["win_rates"], strict=True)
    ]
    tables: list[Table] = [
        Table("", ["model", "Elo (Bradley-Terry)", *(["mean score"] if means else [])], scores),
        Table("", ["win rate of row over column", *models], rates),
    ]
    if found["metrics"]:
        cells = [
            [metric, *("" if value is None else formatted(value, 2) for value in both.values())]
            for metric, both in found["metrics"].items()
        ]
        tables.append(Table("", ["metric against ratings", "correlation over models", "over comparisons"], cells))
    return tables


def _word(cell: Interval) -> str:
    centred: Interval = {"mean": cell["mean"] - 0.5, "low": cell["low"] - 0.5, "high": cell["high"] - 0.5}
    word = verdict(centred, "better", "worse")
    return "" if word == "undecided" else word
