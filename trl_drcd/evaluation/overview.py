"""What a reader gets of `results.jsonl`: `summary.csv`, plots, tables of comparisons, `report.html`, `report.md`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.evaluation import plots
from trl_drcd.evaluation.claims import claims_table
from trl_drcd.evaluation.fronts import above_diagonal, curve_difference, front_difference
from trl_drcd.evaluation.metrics import interval_of
from trl_drcd.evaluation.points import USUAL_TEMPERATURE, Line, correlation, draws_of, fronts_of, lambda_sweeps, pooled
from trl_drcd.evaluation.records import read_samples
from trl_drcd.evaluation.report import comparison_markdown, comparison_page
from trl_drcd.evaluation.tables import formatted, markdown, verdict
from trl_drcd.files import write_text

# Columns of the table, where they were measured
TABLE = {
    "quality": "quality",
    "adherence": "text adherence",
    "preference": "preference (nats)",
    "prompt_information": "information on the prompt (nats)",
    "diversity": "diversity",
    "diversity_between_prompts": "its upper bound",
    "diversity_second": "diversity (second)",
    "entropy_per_token": "entropy (nats/token)",
    "kl": "KL to guided teacher (nats)",
    "frechet": "Fréchet distance",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
}
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def points_table(points: Sequence[Line]) -> Table:
    """Every point with the metrics that all have, and what it costs."""
    known = set.intersection(*(set(point["metrics"]) for point in points))
    more = {name: name.replace("_", " ") for point in points for name in point["values"] if name not in TABLE}
    if "preference" not in known:
        known -= {"quality"}  # which is adherence then
    columns = {name: head for name, head in (TABLE | more).items() if name in known}
    first = points[0]["metrics"]["tokens_per_second"]["mean"]
    unit = "codes" if points[0].get("kind") == "music" else "tokens"
    rows = []
    for point in points:
        speed = point["metrics"]["tokens_per_second"]["mean"]
        passes = point.get("passes_per_token", 1 if point["guidance_scale"] == 1 else 2)
        name = point["name"] + (f" ({point['runs']} trainings)" if point["runs"] > 1 else "")
        cells = [formatted(point["metrics"][metric]) for metric in columns]
        rows.append([name, *cells, f"{speed:.0f}", f"{first / speed:.2f}", str(passes)])
    return ["", *columns.values(), f"{unit}/s", "time per token", "passes per token"], rows


def fronts_table(points: Sequence[Line], quality: str, diversity: str) -> Table:
    """
    Every pair of fronts: the difference of their heights in quality over the diversities that both reach, which says
    which lies above, and of the areas that they dominate above the worst point of both, where reach counts as well.
    """
    header = [
        "fronts",
        f"mean difference of {quality}",
        "the first is",
        f"difference of areas ({quality} x {diversity})",
    ]
    rows = []
    for (a, ours), (b, theirs) in combinations(fronts_of(points).items(), 2):
        one, other = draws_of(ours, diversity, quality), draws_of(theirs, diversity, quality)
        area = front_difference(one, other, np.minimum(one[:, 0].min(0), other[:, 0].min(0)))
        heights = curve_difference(one, other)
        shared = np.isfinite(heights[0]) and np.isfinite(heights).mean() > 0.5
        height = interval_of(heights) if shared else None
        words = [formatted(height), verdict(height, "above", "below")] if height else ["no shared diversity", ""]
        rows.append([f"{a} - {b}", *words, formatted(area, 4)])
    return header, rows


def lambda_table(points: Sequence[Line], metrics: Sequence[str]) -> Table:
    """How far each metric along lambda lies above the straight line between the ends, paired, with intervals."""
    rows = []
    for strategy, group in lambda_sweeps(points).items():
        at = [point["interpolation_weight"] for point in group]
        gaps = {metric: above_diagonal(draws_of(group, metric)[..., 0], at) for metric in metrics}
        for number in range(1, len(group) - 1):
            cells = [formatted(interval_of(gap[number])) for gap in gaps.values()]
            rows.append([f"{strategy}, λ {at[number]:g}", *cells])
        if len(group) > 2:
            cells = [formatted(interval_of(gap[1:-1].mean(0))) for gap in gaps.values()]
            rows.append([f"{strategy}, mean between the ends", *cells])
    return ["above the straight line", *metrics], rows


def agreement_table(points: Sequence[Line]) -> Table:
    """Correlations over the points of embedding diversity, by both embeddings, and entropy: Appendix C.2."""
    metrics = [
        m for m in ("diversity", "diversity_second", "entropy_per_token") if all(m in p["values"] for p in points)
    ]
    usual = [point for point in points if point["temperature"] == USUAL_TEMPERATURE]
    groups = {"all": points} | ({f"at temperature {USUAL_TEMPERATURE}": usual} if len(usual) < len(points) else {})
    rows = [
        [f"{a.replace('_', ' ')}, {b.replace('_', ' ')}", *(formatted(correlation(g, a, b)) for g in groups.values())]
        for a, b in combinations(metrics, 2)
        if min(map(len, groups.values())) > 2
    ]
    return ["correlation over strategies", *(f"{name} ({len(group)})" for name, group in groups.items())], rows


def write_report(results: list[Line], prompts: list[Any], args: Any) -> None:
    """`summary.csv`, plots, `report.html`, its tables and texts as `report.md`; `args` are the evaluation's."""
    output, points = Path(args.output_dir), pooled(results)
    write_text(output / "summary.csv", summary(results))
    known = set.intersection(*(set(point["values"]) for point in points))
    qualities = [m for m in ("quality", "adherence", "prompt_information") if m in known]
    if points[0].get("omega") is None and "quality" in qualities:
        qualities.remove("adherence")  # which it is
    diversities = [m for m in ("diversity", "diversity_second") if m in known]
    figures = write_plots(points, qualities, diversities, output)
    tables: dict[str, Table] = {"": points_table(points)}
    for quality in qualities:
        for diversity in diversities:
            tables[f"Fronts in {quality} and {diversity}".replace("_", " ")] = fronts_table(points, quality, diversity)
    tables["Along lambda"] = lambda_table(points, [*qualities, *diversities])
    tables["Embedding diversity and entropy"] = agreement_table(points)
    for quality in qualities:
        for diversity in diversities:
            tables[f"The paper's claims in {quality} and {diversity}".replace("_", " ")] = claims_table(
                points, quality, diversity
            )
    tables = {head: table for head, table in tables.items() if table[1]}
    step = max(1, len(prompts) // max(1, args.listen))
    shown = [prompts[i] for i in range(0, len(prompts), step)[: args.listen]]
    requests = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in shown]
    completions = {row["name"]: read_samples(output / "samples" / row["samples"]) for row in results}
    page = comparison_page("Quality and diversity", about(points, args), tables, requests, completions, figures)
    write_text(output / "report.html", page)
    parts = [(f"## {head}\n\n" if head else "") + markdown(*table) for head, table in tables.items()]
    if shown and points[0].get("kind") == "text":
        parts += ["## Completions", comparison_markdown(requests, completions)]
    write_text(output / "report.md", "\n\n".join([about(points, args), *parts]) + "\n")


def write_plots(points: Sequence[Line], qualities: list[str], diversities: list[str], output: Path) -> list[bytes]:
    """The plots that what was measured allows, as PNG and SVG files; returns the PNG."""
    figures = []
    for diversity in diversities:
        for quality in qualities:
            name = "front" + (f"_{quality}" if quality != "quality" else "")
            name += "" if diversity == "diversity" else "_second"
            figures.append(plots.save(plots.front_plot(points, diversity, quality), output / name))
    if diversities and qualities:
        curves = plots.lambda_plot(points, (*qualities, *diversities[:1]))
        if curves is not None:
            figures.append(plots.save(curves, output / "lambda"))
    if diversities and len(points) > 2:
        figures.append(plots.save(plots.agreement_plot(points, diversities), output / "entropy"))
    return figures


def about(points: Sequence[Line], args: Any) -> str:
    """What the numbers are, in words."""
    parts = [
        f"{args.num_prompts} held-out prompts x {args.samples_per_prompt} samples, seed {args.seed}; mean and 95 % "
        "bootstrap interval over prompts, and over training seeds where a point has several (few of which make it too "
        "narrow)."
    ]
    if "quality" in points[0]["metrics"]:
        omega = points[0].get("omega")
        parts.append(
            "Quality: text adherence." if omega is None else f"Quality: {omega:.4g} x adherence + preference."
        )
    if "diversity" in points[0]["metrics"]:
        parts.append(
            "Diversity: mean cosine distance of the samples of a prompt; 0 if they are equal, and its upper bound is "
            "that of samples of different prompts."
        )
    if "frechet" in points[0]["metrics"]:
        floor = points[0]["metrics"]["frechet_floor"]["mean"]
        parts.append(
            f"Fréchet distance: to held-out recordings under the judge; as many draws of their own normal "
            f"distribution score {floor:.3f}, for so few samples are biased upwards."
        )
    parts.append("Time per token: the first row's is 1; it tells little where other jobs ran beside it.")
    return " ".join(parts)


def summary(results: Sequence[Line]) -> str:
    """All rows as CSV: what they are, and mean, low and high of every metric."""
    metrics = list(dict.fromkeys(name for row in results for name in row["metrics"]))
    about = ["name", "strategy", "model", "guidance_scale", "temperature", "interpolation_weight", "diversity_coef",
             "training_seed", "omega"]  # fmt: skip
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*about, *(f"{name}{part}" for name in metrics for part in ("", "_low", "_high"))])
    for row in results:
        cells = [row["metrics"].get(name, {}).get(part, "") for name in metrics for part in ("mean", "low", "high")]
        writer.writerow([*(row.get(name) for name in about), *cells])
    return file.getvalue()
