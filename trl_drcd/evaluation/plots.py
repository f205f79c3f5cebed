"""Plots of what was measured: the quality-diversity front, curves along lambda, two measures of diversity."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd._extras import require
from trl_drcd._files import write_bytes

from .fronts import pareto_front

# Okabe and Ito's colours, which the colour-blind can tell apart; yellow is too light for lines on white
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*<>"
LABELS = {
    "quality": "quality",
    "adherence": "text adherence (cosine)",
    "preference": "preference (nats)",
    "diversity": "diversity (1 - cosine)",
    "diversity_second": "diversity, second embedding (1 - cosine)",
    "entropy_per_token": "entropy (nats per token)",
    "kl": "KL to the guided teacher (nats)",
}
SWEPT = {"guidance_scale": "γ", "temperature": "T", "interpolation_weight": "λ"}


def _label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def _by_strategy(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["strategy"], []).append(row)
    return groups


def swept(rows: list[dict[str, Any]]) -> str | None:
    """What differs among the rows of a strategy: `guidance_scale`, `temperature` or `interpolation_weight`."""
    return next((name for name in SWEPT if len({row[name] for row in rows}) > 1), None)


def _new_axes(width: float = 7.0, height: float = 5.0) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "plot").Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _interval(rows: list[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Means `(n,)`, and distances `(2, n)` to the low and the high end of their intervals."""
    mean, low, high = (np.array([row["metrics"][metric][part] for row in rows]) for part in ("mean", "low", "high"))
    return mean, np.stack([mean - low, high - mean])


def front_plot(rows: list[dict[str, Any]], x: str = "diversity", y: str = "quality") -> Any:
    """
    Every row as a point with its 95 % intervals, the rows of a sweep joined: Fig. 1 and 3 of the paper.

    Args:
        rows (`list[dict]`): Lines of `results.jsonl`.
        x, y (`str`, *optional*): Metrics; both are better the higher.

    Returns:
        `matplotlib.figure.Figure`: See [`save`].
    """
    figure, axes = _new_axes()
    points = np.array([[row["metrics"][m]["mean"] for m in (x, y)] for row in rows])
    front = points[pareto_front(points)]
    axes.plot(*front.T, color="0.8", linewidth=6, solid_capstyle="round", zorder=0, label="front of all")
    for number, (strategy, group) in enumerate(_by_strategy(rows).items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        parameter = swept(group)
        group = sorted(group, key=lambda row: row[parameter]) if parameter else group
        (at_x, bars_x), (at_y, bars_y) = _interval(group, x), _interval(group, y)
        axes.errorbar(
            at_x, at_y, xerr=bars_x, yerr=bars_y, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.35, zorder=1
        )
        style = "-" if parameter else ""
        axes.plot(at_x, at_y, style, marker=marker, color=colour, markersize=6, label=strategy, zorder=2)
        if parameter:
            for row, *at in list(zip(group, at_x, at_y, strict=True))[:: 1 + len(group) // 8]:
                axes.annotate(
                    f"{SWEPT[parameter]} {row[parameter]:g}", at, textcoords="offset points", xytext=(5, 4),
                    fontsize=7, color=colour,
                )  # fmt: skip
    axes.set_xlabel(_label(x) + "  →")
    axes.set_ylabel(_label(y) + "  →")
    axes.legend(frameon=False, fontsize=8)
    return figure


def lambda_plot(rows: list[dict[str, Any]], metrics: tuple[str, ...] = ("quality", "diversity")) -> Any:
    """
    Metrics along lambda, with their 95 % bands and the straight line between the ends: Fig. 4 (left) of the paper.

    Args:
        rows (`list[dict]`): Lines of `results.jsonl`; strategies without a sweep of lambda are left out.
        metrics (`tuple[str, ...]`, *optional*): One panel each.

    Returns:
        `matplotlib.figure.Figure` or `None`: `None` where nothing is swept.
    """
    sweeps = {s: g for s, g in _by_strategy(rows).items() if swept(g) == "interpolation_weight"}
    if not sweeps:
        return None
    figure = require("matplotlib.figure", "plot").Figure((4.5 * len(metrics), 3.8), layout="constrained")
    for panel, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(1, len(metrics), panel)
        for number, (strategy, group) in enumerate(sweeps.items()):
            colour = COLOURS[(number + 1) % len(COLOURS)]
            group = sorted(group, key=lambda row: row["interpolation_weight"])
            at = [row["interpolation_weight"] for row in group]
            mean, bars = _interval(group, metric)
            axes.plot(at, mean, "-o", color=colour, markersize=4, label=strategy)
            axes.fill_between(at, mean - bars[0], mean + bars[1], color=colour, alpha=0.15, linewidth=0)
            axes.plot(at[:: len(at) - 1], mean[:: len(at) - 1], "--", color=colour, linewidth=1)
        axes.set(xlabel="λ", ylabel=_label(metric))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def save(figure: Any, path: Path) -> bytes:
    """Writes `path` with `.png` and with `.svg`, each in one piece; returns the PNG."""
    written = {}
    for kind in ("png", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=150)
        write_bytes(path.with_suffix(f".{kind}"), file.getvalue())
        written[kind] = file.getvalue()
    return written["png"]
