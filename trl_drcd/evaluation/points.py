"""
Lines of `results.jsonl` as points to be compared: quality made of its parts, training seeds pooled, paired draws.

Letters: `n` points, `R` training seeds of a point, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.evaluation.metrics import bootstrap_interval, interval_of, resampled_means
from trl_drcd.evaluation.records import parse_lines

Line = dict[str, Any]
# What everything is sampled at unless it says otherwise, as in the paper
USUAL_TEMPERATURE = 0.99


def read_results(file: str | Path) -> list[Line]:
    """
    All lines of a `results.jsonl`.

    Raises:
        ValueError: If one is no result.
    """
    return parse_lines(file, Path(file).read_text(), {"metrics", "per_prompt"})


def with_quality(results: Sequence[Line], omega: str | float = 5.0) -> list[Line]:
    """
    Lines with `quality = omega * adherence + preference` of each prompt, its interval, and the `omega` used.

    Where nothing has a preference, quality is adherence, and `omega` is `None`. The paper takes 5 so that both parts
    vary alike (Section 3.1); `equal` does so for the lines at hand: the range (largest minus smallest) of the mean
    preferences over that of the mean adherences, training seeds pooled.

    Args:
        results (`list[dict]`): Lines; stored as they were measured, so that another omega needs no measuring.
        omega (`str` or `float`, *optional*, defaults to 5.0): A number, or `"equal"`.

    Returns:
        `list[dict]`: New lines, in order; without adherence as they were.

    Raises:
        ValueError: If `omega="equal"` and the mean adherences are all one.
    """
    has = [{"adherence", "preference"} <= set(line["per_prompt"]) for line in results]
    weight = None if not all(has) else equal_omega(results) if omega == "equal" else float(omega)
    lines = []
    for line in results:
        if "adherence" not in line["per_prompt"]:
            lines.append(line)
            continue
        adherence = np.array(line["per_prompt"]["adherence"])
        quality = adherence if weight is None else weight * adherence + np.array(line["per_prompt"]["preference"])
        rounded = [float(f"{value:.6g}") for value in quality]
        lines.append(
            line
            | {"omega": weight, "per_prompt": line["per_prompt"] | {"quality": rounded}}
            | {"metrics": line["metrics"] | {"quality": bootstrap_interval(quality)}}
        )
    return lines


def equal_omega(results: Sequence[Line]) -> float:
    """The omega with which `omega * adherence` has the range of the preference over the points' means."""
    points = pooled(results)
    adherence, preference = (np.ptp([p["values"][m].mean() for p in points]) for m in ("adherence", "preference"))
    if adherence == 0:
        raise ValueError("`omega=equal` needs strategies that differ in adherence; all have one mean; give a number")
    return float(preference / adherence)


def pooled(results: Iterable[Line]) -> list[Line]:
    """
    One line for each point: rows that differ in their training seed alone are one, with an interval over both.

    Args:
        results (`list[dict]`): Lines.

    Returns:
        `list[dict]`: In order of first appearance; what a line says is the first seed's, with `name` the point's,
        `runs` the number of seeds, and `values`, metric to its values, shape `(R, P)`. Metrics that are not prompt by
        prompt are means over the seeds, and so are their ends.
    """
    groups: dict[str, list[Line]] = {}
    for line in results:
        groups.setdefault(str(line.get("point", line["name"])), []).append(line)
    points = []
    for name, lines in groups.items():
        shared = [metric for metric in lines[0]["per_prompt"] if all(metric in line["per_prompt"] for line in lines)]
        values = {metric: np.array([line["per_prompt"][metric] for line in lines]) for metric in shared}
        metrics = {
            metric: {end: float(np.mean([line["metrics"][metric][end] for line in lines])) for end in one}
            for metric, one in lines[0]["metrics"].items()
            if all(metric in line["metrics"] for line in lines)
        }
        if len(lines) > 1:
            metrics |= {metric: interval_of(resampled_means(value)) for metric, value in values.items()}
        points.append(lines[0] | {"name": name, "runs": len(lines), "metrics": metrics, "values": values})
    return points


def draws_of(points: Sequence[Line], *metrics: str) -> np.ndarray:
    """Means and their paired bootstrap draws, see `resampled_means`: `(n, 1 + resamples, len(metrics))`."""
    return np.array([np.stack([resampled_means(p["values"][metric]) for metric in metrics], -1) for p in points])


# ---------------------------------------------------------------- which points belong together


def is_base(point: Line) -> bool:
    """The base model without guidance at the usual temperature."""
    return not point["weights"] and point["guidance_scale"] == 1 and point["temperature"] == USUAL_TEMPERATURE


def is_trained(point: Line) -> bool:
    """One trained model as it is, without guidance at the usual temperature."""
    return len(point["weights"]) == 1 and point["guidance_scale"] == 1 and point["temperature"] == USUAL_TEMPERATURE


def sweeps_base(group: Sequence[Line]) -> bool:
    """Whether rows of a strategy differ from the base in one thing alone, guidance or temperature."""
    usual = all(p["temperature"] == USUAL_TEMPERATURE for p in group) or all(p["guidance_scale"] == 1 for p in group)
    return usual and not any(point["weights"] for point in group)


def fronts_of(points: Sequence[Line]) -> dict[str, list[Line]]:
    """
    Points that make a front together, at least two: each sweep (of the base model with the base in it), and the single
    trained models as one.
    """
    base = [point for point in points if is_base(point)]
    groups: dict[str, list[Line]] = {}
    for point in points:
        if not is_base(point) and not is_trained(point):
            groups.setdefault(point["strategy"], []).append(point)
    fronts = {name: [*(base if sweeps_base(group) else []), *group] for name, group in groups.items()}
    fronts["trained models"] = [point for point in points if is_trained(point)]
    return {name: group for name, group in fronts.items() if len(group) > 1}


def lambda_sweeps(points: Sequence[Line]) -> dict[str, list[Line]]:
    """The points of each strategy along lambda that goes from 0 to 1, by rising lambda."""
    groups: dict[str, list[Line]] = {}
    for point in points:
        if point["interpolation_weight"] is not None:
            groups.setdefault(point["strategy"], []).append(point)
    sweeps = {name: sorted(group, key=lambda p: p["interpolation_weight"]) for name, group in groups.items()}
    ends = {
        name: (group[0]["interpolation_weight"], group[-1]["interpolation_weight"]) for name, group in sweeps.items()
    }
    return {name: group for name, group in sweeps.items() if ends[name] == (0, 1)}


def correlation(points: Sequence[Line], x: str, y: str) -> dict[str, float]:
    """
    Pearson's correlation of two metrics over the points, with its bootstrap interval over prompts.

    Raises:
        ValueError: If there are fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"a correlation needs at least 3 points, got {len(points)}")
    draws = draws_of(points, x, y)
    draws = draws - draws.mean(0)
    a, b = draws[..., 0], draws[..., 1]
    with np.errstate(invalid="ignore"):
        return interval_of((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0)))
