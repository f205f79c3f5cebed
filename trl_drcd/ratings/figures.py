"""Fig. 5 and Fig. 7 of https://huggingface.co/papers/2410.06084, from a study's own ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.compat.extras import require
from trl_drcd.evaluation.plots import save

SIMULATED = "SIMULATED RATERS, not people"


def plain(name: str) -> str:
    """A name that matplotlib shows literally: `$` starts no formula."""
    return name.replace("$", r"\$")


def win_rate_figure(tables: Mapping[str, np.ndarray], models: Sequence[str], simulated: bool) -> Any:
    """
    Plot win rates of the row's model over the column's, one matrix per question: Fig. 5.

    Args:
        tables (`Mapping[str, np.ndarray]`): Question to win rates, `(M, M)`; NaN where a pair was not compared.
        models (`Sequence[str]`): Names of the `M` models.
        simulated (`bool`): Whether to label the figure as simulated.

    Returns:
        `matplotlib.figure.Figure`: For `trl_drcd.evaluation.plots.save`.
    """
    size = 1.6 + 0.75 * len(models)
    figure = require("matplotlib.figure", "plot").Figure((size * len(tables) + 0.8, size), layout="constrained")
    for number, (question, rates) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(1, len(tables), number)
        axes.imshow(rates, cmap="PuOr", vmin=0, vmax=1)
        for row, column in zip(*np.nonzero(np.isfinite(rates)), strict=True):
            value = rates[row, column]
            colour = "white" if abs(value - 0.5) > 0.3 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        names = [plain(name) for name in models]
        axes.set_xticks(range(len(models)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(models)), names)
        axes.set_title(f"{question}: win rate of row over column", fontsize=10)
    _label(figure, simulated)
    return figure


def score_figure(panels: Mapping[str, Mapping[str, dict[str, Any]]], simulated: bool) -> Any:
    """
    Plot a score of every model with its interval, one panel per measure: Fig. 7.

    Args:
        panels (`Mapping`): Title of each panel to a mapping from model to `mean`, `low`, `high`.
        simulated (`bool`): Whether to label the figure as simulated.

    Returns:
        `matplotlib.figure.Figure`: For `trl_drcd.evaluation.plots.save`.
    """
    models = list(next(iter(panels.values())))
    figure = require("matplotlib.figure", "plot").Figure(
        (3.6 * len(panels), 1.4 + 0.38 * len(models)), layout="constrained"
    )
    for number, (title, scores) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x")
        for place, model in enumerate(models):
            value = scores[model]
            if not np.isfinite(value["mean"]):
                continue
            axes.plot([value["low"], value["high"]], [place, place], color="#0072B2", lw=2)
            axes.plot(value["mean"], place, "o", color="#0072B2")
        axes.set_yticks(range(len(models)), [plain(m) for m in models] if number == 1 else [""] * len(models))
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
    _label(figure, simulated)
    return figure


def _label(figure: Any, simulated: bool) -> None:
    if simulated:
        figure.suptitle(SIMULATED, color="#B00000", fontsize=10, fontweight="bold")


def save_figures(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Save each figure as PNG and SVG under its name; return the PNG files."""
    for name, figure in figures.items():
        save(figure, folder / name)
    return [folder / f"{name}.png" for name in figures]
