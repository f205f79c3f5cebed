"""Plots of what was measured: the quality-diversity front, curves along lambda, two measures of diversity."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.compat.extras import require
from trl_drcd.evaluation.fronts import above_diagonal, pareto_front
from trl_drcd.evaluation.metrics import interval_of
from trl_drcd.evaluation.points import Line, correlation, draws_of, is_base, lambda_sweeps, sweeps_base
from trl_drcd.files import write_bytes

# Okabe and Ito's colours, which the colour-blind can tell apart; yellow is too light for lines on white
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vph*<>"
# Where labels stand, one sweep after the other: offset in points and alignment
PLACES = (((6, 5), "left"), ((-6, -11), "right"), ((6, -11), "left"))
LABELS = {
    "quality": "quality",
    "prompt_information": "information on the prompt (nats)",
    "adherence": "text adherence (cosine)",
    "preference": "preference (nats)",
    "diversity": "diversity (1 - cosine)",
    "diversity_second": "diversity, second embedding (1 - cosine)",
    "entropy_per_token": "entropy (nats per token)",
    "kl": "KL to the guided teacher (nats)",
}
SWEPT = {"guidance_scale": "γ", "temperature": "T", "interpolation_weight": "λ"}


def _plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: no formula, and not left out for a `_` at its head."""
    return f" {name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def _label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def _by_strategy(rows: Sequence[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for row in rows:
        groups.setdefault(row["strategy"], []).append(row)
    return groups


def swept(rows: Sequence[Line]) -> str | None:
    """What differs among the rows of a strategy: `guidance_scale`, `temperature` or `interpolation_weight`."""
    return next((name for name in SWEPT if len({row[name] for row in rows}) > 1), None)


def _new_axes(width: float = 7.0, height: float = 5.0) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "plot").Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _interval(rows: Sequence[Line], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Means `(n,)`, and distances `(2, n)` to the low and the high end of their intervals."""
    mean, low, high = (np.array([row["metrics"][metric][part] for row in rows]) for part in ("mean", "low", "high"))
    return mean, np.stack([mean - low, high - mean])


def front_plot(points: Sequence[Line], x: str = "diversity", y: str = "quality") -> Any:
    """
    Every point with its 95 % intervals, those of a sweep joined: Fig. 1 and 3 of the paper.

    Args:
        points (`list[dict]`): Lines of `results.jsonl`, or of [`~trl_drcd.evaluation.points.pooled`].
        x, y (`str`, *optional*): Metrics; both are better the higher.

    Returns:
        `matplotlib.figure.Figure`: See [`save`].
    """
    figure, axes = _new_axes()
    at = np.array([[point["metrics"][m]["mean"] for m in (x, y)] for point in points])
    front = at[pareto_front(at)]
    axes.plot(*front.T, color="0.85", linewidth=7, solid_capstyle="round", zorder=0, label="front of all")
    base = [point for point in points if is_base(point)]
    sweeps, labels = 0, []
    for number, (strategy, group) in enumerate(_by_strategy(points).items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        again = number >= len(COLOURS)  # a colour that is taken comes back hollow and dashed
        parameter = swept(group)
        # A sweep of the base goes through the base, which has a marker of its own
        joined = [*group, *(base if parameter and sweeps_base(group) else [])]
        if parameter:
            group, joined = (sorted(part, key=lambda point: point[parameter]) for part in (group, joined))
        own = {id(point) for point in group}
        (at_x, bars_x), (at_y, bars_y) = _interval(group, x), _interval(group, y)
        axes.errorbar(
            at_x, at_y, xerr=bars_x, yerr=bars_y, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.3, zorder=1
        )
        axes.plot(
            *(_interval(joined, metric)[0] for metric in (x, y)),
            linestyle=("--" if again else "-") if parameter else "none", linewidth=1.6, marker=marker,
            markevery=[i for i, point in enumerate(joined) if id(point) in own],
            color=colour, markersize=7, markeredgewidth=1.2 if again else 0.7,
            markeredgecolor=colour if again else "white", markerfacecolor="white" if again else colour,
            zorder=2 + number + (0 if parameter else 20),
            label=_plain(strategy if len(group) > 1 else group[0].get("point", strategy)),
        )  # fmt: skip
        if parameter:
            place = PLACES[sweeps % len(PLACES)]
            sweeps += 1
            steps = [0, len(group) - 1, *range(1, len(group) - 1)]  # the ends come first where there is little room
            labels += [
                ((at_x[i], at_y[i]), f"{SWEPT[parameter]} {group[i][parameter]:g}", colour, place) for i in steps
            ]
    _annotate(axes, labels, at)
    axes.set_xlabel(_label(x) + "  →")
    axes.set_ylabel(_label(y) + "  →")
    axes.set_title("means and 95 % bootstrap intervals; lines join the points of a sweep", fontsize=8, color="0.4")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def _annotate(axes: Any, labels: Sequence[tuple[Any, str, str, tuple[Any, str]]], points: np.ndarray) -> None:
    """
    Labels beside points (position, text, colour, place), in their place or the first free one, but for those that
    would lie on an earlier label or on one of the points, `(n, 2)`, everywhere.
    """
    axes.autoscale_view()
    dots = axes.transData.transform(points)
    taken: list[np.ndarray] = []
    for at, label, colour, own in labels:
        for offset, side in dict.fromkeys((own, *PLACES)):
            shift = np.array(offset) * axes.figure.dpi / 72
            middle = axes.transData.transform(at) + shift + (17 if side == "left" else -17, 4)
            on_dot = (np.abs(dots - middle) < (21, 10)).all(1).any()
            if not on_dot and not any((np.abs(middle - other) < (38, 13)).all() for other in taken):
                break
        else:
            continue
        taken.append(middle)
        text = axes.annotate(
            label, at, textcoords="offset points", xytext=offset, ha=side, fontsize=7.5, color=colour, zorder=1.5
        )
        text.set_path_effects([_effects().withStroke(linewidth=2.5, foreground="white")])


def lambda_plot(points: Sequence[Line], metrics: tuple[str, ...] = ("quality", "diversity")) -> Any:
    """
    Metrics along lambda beside the straight line between the ends (Fig. 4, left, of the paper), and below them how far
    they lie above that line, paired over prompts; with 95 % bands.

    Args:
        points (`list[dict]`): Of [`~trl_drcd.evaluation.points.pooled`]; what is no sweep of lambda is left out.
        metrics (`tuple[str, ...]`, *optional*): One column each.

    Returns:
        `matplotlib.figure.Figure` or `None`: `None` where no lambda goes from 0 to 1.
    """
    sweeps = lambda_sweeps(points)
    if not sweeps:
        return None
    figure = require("matplotlib.figure", "plot").Figure((4.2 * len(metrics), 5.6), layout="constrained")
    panels = figure.subplots(2, len(metrics), sharex=True, squeeze=False, height_ratios=(3, 2))
    for metric, (above, below) in zip(metrics, panels.T, strict=True):
        for number, (strategy, group) in enumerate(sweeps.items()):
            colour, marker = COLOURS[(number + 1) % len(COLOURS)], MARKERS[(number + 1) % len(MARKERS)]
            at = [point["interpolation_weight"] for point in group]
            mean, bars = _interval(group, metric)
            above.plot(at, mean, "-", marker=marker, color=colour, markersize=5, label=_plain(strategy))
            above.fill_between(at, mean - bars[0], mean + bars[1], color=colour, alpha=0.15, linewidth=0)
            above.plot([0, 1], mean[[0, -1]], "--", color=colour, linewidth=1)
            gaps = [interval_of(gap) for gap in above_diagonal(draws_of(group, metric)[..., 0], at)]
            gap, low, high = (np.array([one[part] for one in gaps]) for part in ("mean", "low", "high"))
            below.plot(at, gap, "-", marker=marker, color=colour, markersize=4)
            below.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        below.axhline(0, color="0.4", linestyle="--", linewidth=1)
        above.set_ylabel(_label(metric))
        below.set(xlabel="λ, from the first model to the second", ylabel="above the straight line")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    panels[0, -1].legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def agreement_plot(points: Sequence[Line], diversities: Sequence[str]) -> Any:
    """
    Embedding diversity against entropy per token, one dot for each strategy, with their correlation: Fig. 7 of the
    paper.

    Args:
        points (`list[dict]`): Of [`~trl_drcd.evaluation.points.pooled`], at least 3.
        diversities (`list[str]`): One panel each.
    """
    figure = require("matplotlib.figure", "plot").Figure((5.2 * len(diversities), 4.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(diversities), squeeze=False)[0], diversities, strict=True):
        for number, (strategy, group) in enumerate(_by_strategy(points).items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            (at_x, bars_x), (at_y, bars_y) = _interval(group, "entropy_per_token"), _interval(group, metric)
            axes.errorbar(
                at_x, at_y, xerr=bars_x, yerr=bars_y, fmt=marker, color=colour, ecolor=(*_rgb(colour), 0.3),
                elinewidth=0.8, markersize=7, markeredgecolor="white", markeredgewidth=0.7, label=_plain(strategy),
                zorder=2 if len(group) > 1 else 3,
            )  # fmt: skip
        r = correlation(points, "entropy_per_token", metric)
        axes.set(xlabel=_label("entropy_per_token"), ylabel=_label(metric))
        axes.set_title(f"correlation {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", fontsize=9, color="0.3")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _effects() -> Any:
    """Outlines of texts."""
    return require("matplotlib.patheffects", "plot")


def save(figure: Any, path: Path) -> bytes:
    """Writes `path` with `.png` and with `.svg`, each in one piece; returns the PNG."""
    written = {}
    for kind in ("png", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=150)
        write_bytes(path.with_suffix(f".{kind}"), file.getvalue())
        written[kind] = file.getvalue()
    return written["png"]
