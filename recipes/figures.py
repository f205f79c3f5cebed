"""
Draw the paper's figures from committed results, or from your own, as PNG and SVG files with a page of captions.

    python recipes/figures.py                       # of this repository: outputs/figures/music, outputs/figures/text
    python recipes/figures.py --results outputs/evaluation/results.jsonl --training outputs/trajectories/results.jsonl

Fig. 1 and 2 are drawn from an evaluation of checkpoints (`checkpoint: [20, 60]`), the others from any evaluation. A
figure whose rows are missing is left out. Fig. 5, and the middle of Fig. 7, need listeners (docs/human_evaluation.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_drcd.evaluation.plots import agreement_plot, front_plot, lambda_plot, save, training_plot
from trl_drcd.evaluation.points import Point, guided_bases, lambda_sweeps, pooled, training_sweeps
from trl_drcd.evaluation.results import read_results
from trl_drcd.files import write_text
from trl_drcd.validation.messages import one_line_errors

OURS = {
    "music": ("results/music/means/results.jsonl", "results/music/trajectories/results.jsonl"),
    "text": ("results/text/study/results.jsonl", None),
}
"""Of each world: the evaluation, and that of the checkpoints of trainings."""
CAPTIONS = {
    "1": "Quality and diversity along training, of guidance, and of merged models. Each line begins at the base.",
    "2": "Along training: KL to the guided teacher, adherence, diversity; dashed the guided base, dotted the mean "
    "distance between samples of different prompts.",
    "3": "Quality and diversity of all strategies.",
    "4_left": "Adherence and diversity along lambda, and how far they lie above the straight line.",
    "4_right": "For comparison, merged models and guidance.",
    "6": "Guidance against the null prompt, and against a negative prompt in words.",
    "7": "Embedding diversity and entropy.",
}


def draw(points: Sequence[Point], training: Sequence[Point], quality: str = "adherence") -> dict[str, Any]:
    """
    The figures by number, `matplotlib.figure.Figure`; without those whose rows are missing.

    Args:
        points (`list[Point]`): Of an evaluation, for Fig. 3, 4, 6 and 7.
        training (`list[Point]`): Of an evaluation of checkpoints, for Fig. 1 and 2; empty if there is none.
        quality (`str`, *optional*, defaults to `"adherence"`): Metric of quality.

    Raises:
        ValueError: If adherence or diversity was not measured.
    """
    for key in (quality, "diversity"):
        if lacking := [point.name for point in [*points, *training] if key not in point.values]:
            raise ValueError(f"the figures need the metric `{key}` of every row, which {lacking[:3]} do not have")
    base = [point for point in points if point.is_base()]
    merged = [point for group in lambda_sweeps(points).values() for point in group]
    null = guided_bases(points)
    words = [point for point in points if point.is_guided_base() and point not in null]
    diversities = [key for key in ("diversity", "diversity_second") if all(key in p.metrics for p in points)]
    along = [key for key in ("kl", quality, "diversity") if all(key in p.metrics for p in training)]
    figures = {
        "1": front_plot(training, y=quality) if training_sweeps(training) else None,
        "2": training_plot(training, along),
        "3": front_plot(points, y=quality),
        "4_left": lambda_plot(points, (quality, "diversity")),
        "4_right": front_plot([*base, *null, *merged], y=quality) if merged else None,
        "6": front_plot([*base, *null, *words], y=quality) if words else None,
        "7": agreement_plot(points, diversities) if len(points) > 2 else None,
    }
    return {number: figure for number, figure in figures.items() if figure is not None}


def write(results: Path, training: Path | None, folder: Path) -> None:
    """Write the figures of a world and `README.md`, a page of them."""
    of_training = pooled(read_results(training)) if training else []
    figures = draw(pooled(read_results(results)), of_training)
    parts = [f"# Figures\n\nFrom `{results}`{f' and `{training}`' if training else ''}; 95 % intervals."]
    for number, figure in figures.items():
        save(figure, folder / f"figure_{number}")
        name = f"Fig. {number.replace('_', ', ')}"
        parts.append(f"## {name}\n\n{CAPTIONS[number]}\n\n![{name}](figure_{number}.png)")
    if missing := [f"Fig. {number.replace('_', ', ')}" for number in CAPTIONS if number not in figures]:
        parts.append(f"Not drawn, for want of rows: {'; '.join(missing)}.")
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")
    print(folder / "README.md")


def main(argv: list[str] | None = None) -> None:
    """Draw the figures of both worlds, or of the given results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="results.jsonl of an evaluation, in place of this repository's")
    parser.add_argument("--training", type=Path, help="results.jsonl of an evaluation of checkpoints, with --results")
    parser.add_argument("--output", type=Path, default=Path("outputs/figures"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.training and not args.results:
        parser.error("--training needs --results")
    with one_line_errors("figures.py"):
        if args.results:
            write(args.results, args.training, args.output)
            return
        for world, (results, training) in OURS.items():
            write(Path(results), Path(training) if training else None, args.output / world)


if __name__ == "__main__":
    main()
