"""Plots of an evaluation: the quality-diversity front, curves along lambda and training, diversity and entropy."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.compat.extras import require
from trl_drcd.evaluation.fronts import above_diagonal, pareto_front
from trl_drcd.evaluation.metrics import metric
from trl_drcd.evaluation.points import (
    Comparison,
    Point,
    by_strategy,
    guidance_curve,
    lambda_of,
    lambda_sweeps,
    starts_at_base,
    training_sweeps,
)
from trl_drcd.files import write_bytes

# Types of matplotlib, an optional dependency
Figure = Any
Axes = Any

# Okabe and Ito's colour-blind-safe palette, without yellow, which is too light for lines on white
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vph*<>"
# Preferred label positions, by sweep: offset in points and alignment
PLACES = (((6, 5), "left"), ((-6, -11), "right"), ((6, -11), "left"))
SWEPT = {
    "guidance_scale": "γ",
    "early_steps": "early",
    "early_guidance_scale": "early γ",
    "temperature": "T",
    "interpolation_weight": "λ",
    "checkpoint": "step",
}


@dataclass(frozen=True)
class Plot:
    """
    A plot of the report.

    Args:
        heading (`str`): Its heading on the page.
        png (`bytes`): The PNG image.
    """

    heading: str
    png: bytes


def _plain(name: str) -> str:
    """A name that matplotlib shows literally: `$` starts no formula, and a leading `_` does not hide the label."""
    return f" {name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def _axis(key: str) -> str:
    """A metric's heading, with an arrow towards better values."""
    arrow = {"higher": "  →", "lower": "  ←", None: ""}
    return metric(key).heading + arrow[metric(key).better]


def _style(number: int) -> dict[str, Any]:
    """Colour and marker of a strategy; once all colours are used, markers are hollow."""
    colour, again = COLOURS[number % len(COLOURS)], number >= len(COLOURS)
    return {
        "color": colour, "marker": MARKERS[number % len(MARKERS)], "markeredgewidth": 1.2 if again else 0.7,
        "markeredgecolor": colour if again else "white", "markerfacecolor": "white" if again else colour,
    }  # fmt: skip


def swept(group: Sequence[Point]) -> str | None:
    """The setting of [`SWEPT`] that a strategy sweeps, or `None`."""
    return next((name for name in SWEPT if len({getattr(point, name) for point in group}) > 1), None)


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, `(rows, columns)`."""
    figure = require("matplotlib.figure", "plot").Figure(size, layout="constrained")
    panels: np.ndarray = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def _interval(points: Sequence[Point], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Means `(n,)`, and distances `(2, n)` to the lower and upper ends of their intervals."""
    ends = [point.metrics[key] for point in points]
    mean, low, high = np.array([(end["mean"], end["low"], end["high"]) for end in ends]).T
    return mean, np.stack([mean - low, high - mean])


def front_plot(points: Sequence[Point], x: str = "diversity", y: str = "quality") -> Figure:
    """
    Plot every point with its 95 % intervals and join the points of a sweep: Fig. 1 and 3 of the paper.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`].
        x, y (`str`, *optional*): Keys of the metrics on the axes; higher must be better for both.

    Returns:
        `matplotlib.figure.Figure`: See [`save`].
    """
    figure, ((axes,),) = _panels(1, 1, (9.0, 5.2))
    at = np.array([[point.metrics[key]["mean"] for key in (x, y)] for point in points])
    axes.plot(
        *at[pareto_front(at)].T, color="0.85", linewidth=7, solid_capstyle="round", zorder=0, label="front of all"
    )
    base = [point for point in points if point.is_base()]
    labels: list[_Label] = []
    sweeps = 0
    for number, (strategy, group) in enumerate(by_strategy(points).items()):
        style, parameter = _style(number), swept(group)
        joined = group
        if parameter:
            # The line of a sweep of the base, or of a training, also passes through the base, which has its own marker
            starts = base if starts_at_base(group) else []
            joined = sorted([*group, *starts], key=lambda p: getattr(p, parameter) or 0)
            ends_first = [group[0], group[-1], *group[1:-1]]
            labels += [_Label(point, parameter, style["color"], sweeps) for point in ends_first]
            sweeps += 1
        (at_x, bars_x), (at_y, bars_y) = _interval(group, x), _interval(group, y)
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.7, "alpha": 0.22, "zorder": 1}
        axes.errorbar(at_x, at_y, xerr=bars_x, yerr=bars_y, **bars)
        line = "--" if number >= len(COLOURS) else "-"
        axes.plot(
            *(_interval(joined, key)[0] for key in (x, y)), linestyle=line if parameter else "none", linewidth=1.4,
            markersize=6, markevery=[i for i, point in enumerate(joined) if point.strategy == strategy], **style,
            zorder=2 + number + (0 if parameter else 20), label=_plain(strategy if len(group) > 1 else group[0].point),
        )  # fmt: skip
    _annotate(axes, labels, at, x, y)
    axes.set(xlabel=_axis(x), ylabel=_axis(y))
    axes.set_title("means and 95 % intervals; lines join the points of a sweep", fontsize=8, color="0.4")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


@dataclass(frozen=True)
class _Label:
    """Label of a point with its value of the swept setting; `sweep` is the number of the sweep."""

    point: Point
    parameter: str
    colour: str
    sweep: int

    @property
    def text(self) -> str:
        return f"{SWEPT[self.parameter]} {getattr(self.point, self.parameter):g}"


def _annotate(axes: Axes, labels: Sequence[_Label], points: np.ndarray, x: str, y: str) -> None:
    """
    Place labels beside their points: at the sweep's preferred position, else at the first that overlaps no earlier
    label and none of the `points`, `(n, 2)`; labels without a free position are dropped.
    """
    axes.autoscale_view()
    dots = axes.transData.transform(points)
    taken: list[np.ndarray] = []
    for label in labels:
        at = label.point.metrics[x]["mean"], label.point.metrics[y]["mean"]
        for offset, side in dict.fromkeys((PLACES[label.sweep % len(PLACES)], *PLACES)):
            shift = np.array(offset) * axes.figure.dpi / 72
            middle = axes.transData.transform(at) + shift + (17 if side == "left" else -17, 4)
            on_dot = (np.abs(dots - middle) < (21, 10)).all(1).any()
            if not on_dot and not any((np.abs(middle - other) < (38, 13)).all() for other in taken):
                break
        else:
            continue
        taken.append(middle)
        text = axes.annotate(
            label.text, at, textcoords="offset points", xytext=offset, ha=side, fontsize=7.5, color=label.colour,
            zorder=1.5,
        )  # fmt: skip
        outline = require("matplotlib.patheffects", "plot").withStroke(linewidth=2.5, foreground="white")
        text.set_path_effects([outline])


def lambda_plot(points: Sequence[Point], metrics: Sequence[str] = ("quality", "diversity")) -> Figure | None:
    """
    Plot metrics along lambda with the straight line between their ends (Fig. 4, left, of the paper), and below them
    how far they lie above that line, paired over prompts; with 95 % bands.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`]; only sweeps of lambda are plotted.
        metrics (`Sequence[str]`, *optional*): Keys of the metrics, one column each.

    Returns:
        `matplotlib.figure.Figure` or `None`: `None` if no sweep of lambda goes from 0 to 1.
    """
    sweeps, comparison = lambda_sweeps(points), Comparison(points)
    if not sweeps:
        return None
    size = (4.4 * len(metrics), 5.8)
    figure, panels = _panels(2, len(metrics), size, sharex=True, height_ratios=(3, 2))
    for key, (above, below) in zip(metrics, panels.T, strict=True):
        for number, (strategy, group) in enumerate(sweeps.items(), 1):
            style, at = _style(number), [lambda_of(point) for point in group]
            mean, bars = _interval(group, key)
            above.plot(at, mean, "-", markersize=5, label=_plain(strategy), **style)
            above.plot([0, 1], mean[[0, -1]], "--", color=style["color"], linewidth=1)
            if len(sweeps) <= 2:  # bands of more sweeps would hide each other; the table has their ends
                above.fill_between(at, mean - bars[0], mean + bars[1], color=style["color"], alpha=0.15, linewidth=0)
            gaps = above_diagonal(comparison.curve(group, key)[..., 0], at)
            ends = [comparison.interval(gap) for gap in gaps]
            gap, low, high = np.array([(end["mean"], end["low"], end["high"]) for end in ends]).T
            below.plot(at, gap, "-", markersize=4, **style)
            below.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
        below.axhline(0, color="0.4", linestyle="--", linewidth=1)
        above.set_ylabel(metric(key).heading)
        below.set(xlabel="λ, from the first model to the second", ylabel="above the straight line")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(sweeps), frameon=False, fontsize=8.5)
    return figure


def training_plot(points: Sequence[Point], metrics: Sequence[str]) -> Figure | None:
    """
    Plot metrics along training with 95 % intervals, from the base at step 0: Fig. 2 of the paper. Lines across are the
    guided base, and for a diversity its upper bound, the mean over samples of different prompts.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`]; only sweeps of checkpoints are plotted.
        metrics (`Sequence[str]`): Keys of the metrics, one panel each.

    Returns:
        `matplotlib.figure.Figure` or `None`: `None` if no strategy sweeps checkpoints.
    """
    sweeps = training_sweeps(points)
    if not sweeps:
        return None
    base = [point for point in points if point.is_base()]
    teacher = [p for p in guidance_curve(points) if p.guidance_scale == p.teacher_guidance_scale]
    figure, (panels,) = _panels(1, len(metrics), (4.0 * len(metrics) + 1.6, 3.7))
    for axes, key in zip(panels, metrics, strict=True):
        across = [(teacher, key, "--", "base with guidance"), (base, f"{key}_between_prompts", ":", "upper bound")]
        for at, name, line, label in across:
            if at and name in at[0].metrics:
                axes.axhline(at[0].metrics[name]["mean"], color="0.35", linestyle=line, linewidth=1.2, label=label)
        for number, (strategy, group) in enumerate(sweeps.items(), 1):
            curve, style = [*base, *group], _style(number)
            steps, (mean, bars) = [point.checkpoint or 0 for point in curve], _interval(curve, key)
            axes.plot(steps, mean, "-", markersize=5, label=_plain(strategy), **style)
            axes.fill_between(steps, mean - bars[0], mean + bars[1], color=style["color"], alpha=0.13, linewidth=0)
        axes.set(xlabel="training step", ylabel=metric(key).heading)
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    labels = {label: handle for handle, label in reversed(found)}
    figure.legend(labels.values(), labels, loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def agreement_plot(points: Sequence[Point], diversities: Sequence[str]) -> Figure:
    """
    Plot embedding diversity against entropy per token, one dot per point, with their correlation: Fig. 7 of the paper.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`], at least 3.
        diversities (`Sequence[str]`): Keys of the diversity metrics, one panel each.
    """
    comparison = Comparison(points)
    figure, panels = _panels(1, len(diversities), (4.6 * len(diversities) + 1.6, 4.4))
    for axes, key in zip(panels[0], diversities, strict=True):
        for number, (strategy, group) in enumerate(by_strategy(points).items()):
            (at_x, bars_x), (at_y, bars_y) = _interval(group, "entropy_per_token"), _interval(group, key)
            style = _style(number)
            bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.7, "alpha": 0.22, "zorder": 1}
            axes.errorbar(at_x, at_y, xerr=bars_x, yerr=bars_y, **bars)
            order = 2 if len(group) > 1 else 3
            axes.plot(at_x, at_y, linestyle="none", markersize=6, label=_plain(strategy), zorder=order, **style)
        r = comparison.correlation(points, "entropy_per_token", key)
        axes.set(xlabel=metric("entropy_per_token").heading, ylabel=metric(key).heading)
        axes.set_title(f"correlation {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", fontsize=9, color="0.3")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> bytes:
    """Write the figure to `path` with the suffixes `.png` and `.svg`, each atomically; return the PNG."""
    written = {}
    for kind in ("png", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=150)
        figure.set_layout_engine("none")  # the places of the first hold for the second
        write_bytes(path.with_suffix(f".{kind}"), file.getvalue())
        written[kind] = file.getvalue()
    return written["png"]


def write_plots(
    points: Sequence[Point], qualities: Sequence[str], diversities: Sequence[str], folder: Path
) -> list[Plot]:
    """Write every plot whose metrics were measured, as PNG and SVG files, into `folder`."""
    figures: dict[str, tuple[str, Figure]] = {}
    for diversity in diversities:
        for quality in qualities:
            names = [quality] if quality != "quality" else []
            names += [diversity.removeprefix("diversity_")] if diversity != "diversity" else []
            heading = f"{metric(quality).label} against {metric(diversity).label}"
            figures["_".join(["front", *names])] = heading, front_plot(points, diversity, quality)
    if diversities and qualities and (curves := lambda_plot(points, (*qualities, *diversities[:1]))):
        figures["lambda"] = "along lambda, from one model to the other", curves
    along = [key for key in ("kl", *qualities[:1], *diversities[:1]) if all(key in point.metrics for point in points)]
    if along and (curves := training_plot(points, along)):
        figures["training"] = "along training, from the base", curves
    if diversities and len(points) > 2 and all("entropy_per_token" in point.values for point in points):
        figures["entropy"] = "embedding diversity and entropy", agreement_plot(points, diversities)
    return [
        Plot(heading[:1].upper() + heading[1:], save(figure, folder / name))
        for name, (heading, figure) in figures.items()
    ]
