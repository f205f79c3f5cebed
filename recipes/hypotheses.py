"""
The hypotheses of the studies (results/music/plan.md, results/music/means/plan.md, results/gradient/plan.md,
results/text/plan.md), tested on their results.

    python recipes/hypotheses.py outputs/study/evaluation/results.jsonl
    python recipes/hypotheses.py outputs/study/evaluation/results.jsonl outputs/study/seed1/results.jsonl --blinded

Height is adherence minus that of the curve of constant guidance at the same diversity, as in recipes/music/heights.py.
Each line has the 95 % interval, over prompts and training seeds, with the diversity that was rewarded and with the
other one; a hypothesis counts only if both agree in sign. The two main ones are decided by Holm's method. With
`--blinded` only half the width of the intervals is told, to decide on the number of samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from trl_drcd.evaluation.fronts import height_above
from trl_drcd.evaluation.joining import FURTHER_PROMPTS_HELP, RESULTS_HELP, read_joined
from trl_drcd.evaluation.points import (
    Comparison,
    Point,
    by_strategy,
    check_measured,
    guidance_curve,
    lambda_of,
    of_training_seed,
    pooled,
)
from trl_drcd.evaluation.statistics import Interval
from trl_drcd.evaluation.tables import formatted, markdown_table
from trl_drcd.validation.messages import one_line_errors

DIVERSITIES = ("diversity", "diversity_second")  # rewarded, and not
MARGIN = 0.01  # of H3
MERGES, BETWEEN, ENDS, HEATED = "LERP", "between", ("quality", "rewarded"), "heated quality"
MAIN = ("H1: merges at the base's diversity - base", "H2: mean height of merges")


class Study(Comparison):
    """
    The points of a study, and statistics of them by hypothesis.

    Args:
        points (`list[Point]`): With `base`, its guidance, and a sweep of lambda called `LERP`.
        diversity (`str`): `"diversity"` or `"diversity_second"`.

    Raises:
        ValueError: If there are fewer than two points of guidance, or no merges.
    """

    def __init__(self, points: list[Point], diversity: str) -> None:
        super().__init__(points)
        self.metrics = diversity, "adherence"
        self.by_strategy = by_strategy(points)
        self.guidance = guidance_curve(points)
        self.merges = sorted(self.by_strategy.get(MERGES, []), key=lambda_of)
        self.by_name = {point.name: point for point in points}
        if len(self.guidance) < 2 or "base" not in self.by_name:
            raise ValueError(f"the results need `base` and two guidance scales, got {list(self.by_name)}")
        if not [point for point in self.merges if 0 < lambda_of(point) < 1]:
            raise ValueError(f"the results need a sweep of lambda called `{MERGES}`, got {list(self.by_name)}")

    def height(self, point: Point, above: list[Point] | None = None) -> np.ndarray:
        """Height of a point above the curve of guidance, or of other points, `(replicates,)`."""
        curve = self.curve(self.guidance if above is None else above, *self.metrics)
        return height_above(self.curve([point], *self.metrics)[0], curve)

    def at(self, diversity: np.ndarray, points: list[Point]) -> np.ndarray:
        """Adherence of the curve of points at a diversity of each replicate, `(replicates,)`."""
        return -height_above(np.stack([diversity, np.zeros_like(diversity)], -1), self.curve(points, *self.metrics))

    def at_base(self) -> np.ndarray:
        """
        Adherence of the merges minus that of the base, at its diversity; where no merge is as diverse, at that of the
        most diverse one, minus that of guidance's curve there.
        """
        most = self.curve(self.merges, *self.metrics)[..., 0].max(0)
        diversity = np.minimum(most, self.means(self.by_name["base"], self.metrics[0]))
        return self.at(diversity, self.merges) - self.at(diversity, self.guidance)

    def statistics(self) -> dict[str, np.ndarray]:
        """The statistic of each hypothesis that the points answer, `(replicates,)`; above 0 it holds."""
        between = [point for point in self.merges if 0 < lambda_of(point) < 1]
        found = {
            MAIN[0]: self.at_base(),
            MAIN[1]: np.mean([self.height(point) for point in between], 0),
        }
        if trained := [point for name, point in self.by_name.items() if name.startswith(BETWEEN)]:
            heights = [self.height(point, self.merges) for point in trained]
            found[f"H3: merges - {BETWEEN}, at its diversity, + {MARGIN}"] = MARGIN - np.mean(heights, 0)
        for end in ENDS:
            soup = self.by_name.get(f"soup of {end}") or self.by_name.get(f"mean of {end}")
            if soup and end in self.by_name:
                found[f"H4: height of {soup.name} - height of {end}"] = self.height(soup) - self.height(
                    self.by_name[end]
                )
        if heated := self.by_strategy.get(HEATED):
            found[f"H5: mean height of {HEATED}"] = np.mean([self.height(point) for point in heated], 0)
            below = [self.height(point, self.merges) for point in heated]
            found[f"H6: merges - {HEATED}, at its diversity"] = -np.mean(below, 0)
        return found


def holm(study: Study, statistics: dict[str, np.ndarray], names: tuple[str, str] = MAIN) -> dict[str, bool]:
    """
    Whether each of two statistics is above 0 by Holm's method, at 5 % for both together, two-sided.

    The one that is above 0 at 97.5 % counts; if one is, 95 % is enough for the other.
    """
    above = {name: study.resampling.interval(statistics[name], 0.975)["low"] > 0 for name in names}
    if any(above.values()):
        above = {name: study.resampling.interval(statistics[name], 0.95)["low"] > 0 for name in names}
    return above


def verdict(rewarded: Interval, other: Interval, significant: bool) -> str:
    """`holds`, `fails` (below 0), or `undecided`; a hypothesis holds only if the other diversity agrees in sign."""
    if rewarded["high"] < 0:
        return "fails"
    if not significant:
        return "undecided"
    return "holds" if other["mean"] > 0 else "undecided: the other diversity disagrees"


def main(argv: list[str] | None = None) -> None:
    """Print a table with a row per hypothesis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help=RESULTS_HELP)
    parser.add_argument("--further_prompts", type=Path, nargs="+", default=[], help=FURTHER_PROMPTS_HELP)
    parser.add_argument("--training_seed", type=int, help="only the models at this place of their lists")
    parser.add_argument("--blinded", action="store_true", help="only how wide the intervals are, no value, no verdict")
    args = parser.parse_args(argv)
    with one_line_errors("hypotheses.py"):
        points = pooled(
            of_training_seed(read_joined(*args.results, further_prompts=args.further_prompts), args.training_seed)
        )
        check_measured(points, (*DIVERSITIES, "adherence"))
        studies = {diversity: Study(points, diversity) for diversity in DIVERSITIES}
    found = {diversity: study.statistics() for diversity, study in studies.items()}
    main_ones = holm(studies["diversity"], found["diversity"])
    table = {}
    for name in found["diversity"]:
        rewarded, other = (studies[key].interval(found[key][name]) for key in DIVERSITIES)
        significant = main_ones.get(name, rewarded["low"] > 0)
        if args.blinded:
            widths = ((one["high"] - one["low"]) / 2 for one in (rewarded, other))
            table[name] = {key: f"± {width:.4f}" for key, width in zip(DIVERSITIES, widths, strict=True)}
            continue
        table[name] = {
            "rewarded diversity": formatted(rewarded),
            "other diversity": formatted(other),
            "verdict": verdict(rewarded, other, significant),
        }
    print(markdown_table(table))
    if args.blinded:
        return
    most = max((studies["diversity"].means(p, "diversity")[0] for p in studies["diversity"].merges), default=0)
    base = studies["diversity"].means(studies["diversity"].by_name["base"], "diversity")[0]
    print(f"\nDiversity of the base {base:.3f}; of the most diverse merge {most:.3f}.")


if __name__ == "__main__":
    main()
