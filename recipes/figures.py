"""
Draw the paper's figures from committed results, or from your own, as PNG and SVG files with a page of captions.

    python recipes/figures.py                       # of this repository: outputs/figures/music, outputs/figures/text
    python recipes/figures.py --results outputs/evaluation/results.jsonl --training outputs/trajectories/results.jsonl

Fig. 1 and 2 are drawn from an evaluation of checkpoints (`checkpoint: [20, 60]`), the others from any evaluation. A
figure whose rows or metrics are missing is left out. Fig. 5, and the middle of Fig. 7, need listeners
(docs/human_evaluation.md).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_drcd.evaluation.joining import RESULTS_HELP, read_joined
from trl_drcd.evaluation.plots import agreement_plot, front_plot, lambda_plot, save, training_plot
from trl_drcd.evaluation.points import Point, guided_bases, lambda_sweeps, pooled, training_sweeps
from trl_drcd.evaluation.results import Result
from trl_drcd.files import write_text
from trl_drcd.validation.messages import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "music": (
        tuple(f"results/music/{name}/results.jsonl" for name in ("means", "pairs/seed1", "means/seed1")),
        ("results/music/trajectories/results.jsonl",),
    ),
    "text": (
        tuple(f"results/text/study{name}/results.jsonl" for name in ("", "/seed1", "/trainings")),
        (),
    ),
}
"""Of each world: the evaluation, with further samples, and that of the checkpoints of trainings."""
CAPTIONS = {
    "1": "Quality and diversity along training, from the base, of guidance, and of merged models.",
    "2": "Along training: KL to the guided teacher, adherence, diversity; dashed the guided base, dotted the mean "
    "distance between samples of different prompts.",
    "3": "Quality and diversity of all strategies.",
    "4_left": "Adherence and diversity along lambda, and how far they lie above the straight line.",
    "4_right": "For comparison, merged models and guidance.",
    "6": "Guidance against the teacher's negative prompt (the null prompt, if it has none), and against others.",
    "7": "Embedding diversity and entropy.",
}


def draw(points: Sequence[Point], training: Sequence[Point], quality: str = "adherence") -> dict[str, Any]:
    """
    The figures by number, `matplotlib.figure.Figure`; without those whose rows or metrics are missing.

    Args:
        points (`list[Point]`): Of an evaluation, for Fig. 3, 4, 6 and 7.
        training (`list[Point]`): Of an evaluation of checkpoints, for Fig. 1 and 2; empty if there is none.
        quality (`str`, *optional*, defaults to `"adherence"`): Metric of quality.
    """

    def measured(rows: Sequence[Point], *keys: str) -> bool:
        return bool(rows) and all(key in point.values for point in rows for key in keys)

    figures: dict[str, Any] = {}
    along = [key for key in ("kl", quality, "diversity") if measured(training, key)]
    if training_sweeps(training) and measured(training, quality, "diversity"):
        figures["1"] = front_plot(training, y=quality)
        figures["2"] = training_plot(training, along)
    if measured(points, quality, "diversity"):
        base = [point for point in points if point.is_base()]
        guided = guided_bases(points)
        other = [point for point in points if point.is_guided_base() and point not in guided]
        merged = [point for group in lambda_sweeps(points).values() for point in group]
        figures["3"] = front_plot(points, y=quality)
        if merged:
            figures["4_left"] = lambda_plot(points, (quality, "diversity"))
            figures["4_right"] = front_plot([*base, *guided, *merged], y=quality)
        if other:
            figures["6"] = front_plot([*base, *guided, *other], y=quality)
    diversities = [key for key in ("diversity", "diversity_second") if measured(points, key)]
    if len(points) > 2 and diversities and measured(points, "entropy_per_token"):
        figures["7"] = agreement_plot(points, diversities)
    return figures


def write(results: Sequence[Path], training: Sequence[Path], folder: Path, quality: str) -> None:
    """Write the figures of an evaluation and `README.md`, a page of them."""
    of_training = pooled(_read(training)) if training else []
    figures = draw(pooled(_read(results)), of_training, quality)
    files = " and ".join(f"`{os.path.relpath(file)}`" for file in (*results, *training))
    parts = [f"# Figures\n\nFrom {files}; 95 % intervals."]
    for number, figure in figures.items():
        save(figure, folder / f"figure_{number}")
        name = f"Fig. {number.replace('_', ', ')}"
        parts.append(f"## {name}\n\n{CAPTIONS[number]}\n\n![{name}](figure_{number}.png)")
    if missing := [f"Fig. {number.replace('_', ', ')}" for number in CAPTIONS if number not in figures]:
        parts.append(f"Not drawn, for want of rows or metrics: {'; '.join(missing)}.")
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")
    print(folder / "README.md")


def _read(results: Sequence[Path]) -> list[Result]:
    """The rows of files `results.jsonl`, or of evaluations' folders."""
    files = [one / "results.jsonl" if one.is_dir() else one for one in results]
    return read_joined(*files)


def main(argv: list[str] | None = None) -> None:
    """Draw the figures of both worlds, or of the given results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help=f"in place of this repository's, an evaluation's folder or {RESULTS_HELP}",
    )
    parser.add_argument(
        "--training", type=Path, nargs="+", default=[], help="the same of an evaluation of checkpoints, with --results"
    )
    parser.add_argument("--quality", default="adherence", help="metric of quality (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/figures"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.training and not args.results:
        parser.error("--training needs --results")
    with one_line_errors("figures.py"):
        if args.results:
            write(args.results, args.training, args.output, args.quality)
            return
        for world, (results, training) in OURS.items():
            write(
                [ROOT / one for one in results],
                [ROOT / one for one in training],
                args.output / world,
                args.quality,
            )


if __name__ == "__main__":
    main()
