"""Tables and JSON lines of what was measured of several models on the same prompts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trl_drcd._run import markdown_table

from .metrics import bootstrap_interval


def formatted(interval: dict[str, float], digits: int = 3) -> str:
    """`mean [low, high]`; what rounds to zero has no sign."""
    mean, low, high = (f"{interval[key]:z.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def verdict(interval: dict[str, float], above: str, below: str) -> str:
    """`above` where the whole interval lies above zero, `below` where it lies below, else `undecided`."""
    if interval["low"] > 0:
        return above
    return below if interval["high"] < 0 else "undecided"


def against_base(
    values: dict[str, np.ndarray], base: dict[str, np.ndarray], columns: dict[str, str]
) -> dict[str, str]:
    """
    Paired differences from the base: the fall of the KL in per cent, the others as they are.

    Args:
        values, base (`dict`): Metric to its values on each prompt, shape `(P,)`; `kl` among them.
        columns (`dict`): Metric to the head of its column.

    Returns:
        `dict`: Head of the column to mean and 95 % bootstrap interval.
    """
    both = np.stack([values["kl"], base["kl"]], 1)
    fall = bootstrap_interval(both, lambda rows: 100 * (1 - rows[:, 0].mean() / rows[:, 1].mean()))
    others = {head: formatted(bootstrap_interval(values[k] - base[k])) for k, head in columns.items() if k != "kl"}
    return {"KL falls by (%)": formatted(fall, 0)} | others


def compare(
    measured: dict[str, dict[str, Any]], columns: dict[str, str], about: str, shared: dict[str, Any]
) -> tuple[dict[str, dict[str, str]], str, str]:
    """
    What was measured of several models, as rows, as JSON lines and as Markdown.

    Args:
        measured (`dict`): Name of a model to its `values` (metric to a list, one number per prompt),
            `tokens_per_second`, and `about`, what its JSON line says besides; the first is the base.
        columns (`dict`): Metric to the head of its column; `kl` among them.
        about (`str`): What stands above the tables.
        shared (`dict`): What all JSON lines say besides.

    Returns:
        `tuple`: Name to its row (head to text), the JSON lines, the Markdown of both tables.
    """
    values = {name: {k: np.array(v) for k, v in one["values"].items()} for name, one in measured.items()}
    rows, lines = {}, []
    for name, one in measured.items():
        metrics = {key: bootstrap_interval(values[name][key]) for key in columns}
        speed = one["tokens_per_second"]
        rows[name] = {columns[key]: formatted(value) for key, value in metrics.items()} | {"tokens/s": f"{speed:.0f}"}
        metrics["tokens_per_second"] = {"mean": speed, "low": speed, "high": speed}
        lines.append(json.dumps({"strategy": name} | one["about"] | shared | {"metrics": metrics}) + "\n")
    base, *others = measured
    paired = {name: against_base(values[name], values[base], columns) for name in others}
    tables = f"{about}\n\n{markdown_table(rows)}\n\nAgainst the base, prompt by prompt:\n\n{markdown_table(paired)}\n"
    return rows, "".join(lines), tables
