"""
Test the paper's claims (https://huggingface.co/papers/2410.06084) on `results.jsonl`, with paired intervals over
prompts and training seeds.

Points are identified by their settings: the base, the base with guidance (at the teacher's gamma), trained models by
their `diversity_coef`, sweeps of lambda, averages of more than two models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from trl_drcd.evaluation.fronts import above_diagonal, curve_difference, front_difference
from trl_drcd.evaluation.metrics import metric
from trl_drcd.evaluation.points import Comparison, Point, guided_bases, lambda_of, lambda_sweeps
from trl_drcd.evaluation.statistics import Interval
from trl_drcd.evaluation.tables import Table, formatted, verdict

NOT_MEASURED = "not measured"
# Tolerance of "as much as", as a fraction of the change that guidance makes
MARGIN = 0.2


@dataclass
class Claim:
    """
    A claim, the measurements that bear on it, and the verdict.

    Args:
        text (`str`): The claim.
        margin (`str`, *optional*): Its tolerance, in words.
        verdict (`str`, *optional*): `holds`, `fails`, `undecided` (the interval contains zero) or `not measured`.
        numbers (`dict`): Name of a measurement to its interval.
    """

    text: str
    margin: str = ""
    verdict: str = NOT_MEASURED
    numbers: dict[str, Interval] = field(default_factory=dict)


class Evidence(Comparison):
    """
    The points that the claims compare, by role.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`].
        quality, diversity (`str`): Keys of the metrics that the claims are about.
    """

    def __init__(self, points: Sequence[Point], quality: str, diversity: str) -> None:
        super().__init__(points)
        self.metrics = (diversity, quality)
        plain = [p for p in points if not p.weights]
        teacher = points[0].teacher_guidance_scale
        self.base = next((p for p in points if p.is_base()), None)
        self.cfg_front = guided_bases(points)
        self.cfg = next((p for p in self.cfg_front if p.guidance_scale == teacher), None)
        self.temperature_front = [p for p in plain if p.guidance_scale == 1]
        trained = [(p.diversity_coef, p) for p in points if p.is_trained() and p.diversity_coef is not None]
        trained.sort(key=lambda pair: pair[0])
        self.quality = next((p for coefficient, p in trained if coefficient == 0), None)
        self.rewarded = [p for coefficient, p in trained if coefficient > 0]
        self.diversity = self.rewarded[-1] if self.rewarded else None
        sweeps = list(lambda_sweeps(points).values())
        most: dict[str, int] = {}  # of several sweeps between the same models, those of most trainings count
        for group in sweeps:
            most[group[0].model] = max(group[0].runs, most.get(group[0].model, 0))
        sweeps = [group for group in sweeps if group[0].runs == most[group[0].model]]
        ends = f"{self.quality.model} + {self.diversity.model}" if self.quality and self.diversity else None
        self.lerp = next((group for group in sweeps if group[0].model == ends), next(iter(sweeps), []))
        names = {p.model for _, p in trained}
        pairs = [point for group in sweeps if set(group[0].model.split(" + ")) <= names for point in group]
        self.pairs = pairs or self.lerp
        uniform = [p for p in points if len(p.weights) > 2 and len(set(p.weights)) == 1]
        both = {p.model for p in (self.quality, self.diversity) if p}  # the mean of one end's seeds is none of all
        self.uniform = next((p for p in uniform if both <= set(p.model.split(" + "))), None)

    def front(self, points: Sequence[Point]) -> np.ndarray:
        """Diversity and quality of points, `(n, replicates, 2)`."""
        return self.curve(points, *self.metrics)


def claims(points: Sequence[Point], quality: str = "quality", diversity: str = "diversity") -> list[Claim]:
    """
    Test every claim.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`], all on the same prompts.
        quality, diversity (`str`, *optional*): Keys of metrics that have values per prompt.

    Returns:
        `list[Claim]`: In the order of the paper.
    """
    evidence = Evidence(points, quality, diversity)
    return [answer(evidence) for answer in ANSWERS]


def claims_tables(points: Sequence[Point], qualities: Sequence[str], diversities: Sequence[str]) -> list[Table]:
    """
    A table of verdicts for each pair of a quality and a diversity metric, and one of the claims without a verdict.

    Args:
        points (`list[Point]`): From [`~trl_drcd.evaluation.points.pooled`], all on the same prompts.
        qualities, diversities (`list[str]`): Keys of metrics that have values per prompt.
    """
    tables, asked, answered = [], [], set()
    for quality, diversity in product(qualities, diversities):
        asked = claims(points, quality, diversity)
        known = [claim for claim in asked if claim.verdict != NOT_MEASURED]
        answered |= {claim.text for claim in known}
        heading = f"The paper's claims in {metric(quality).label} and {metric(diversity).label}"
        tables += (
            [Table(heading, ["claim", "verdict", "measured"], [_cells(claim) for claim in known])] if known else []
        )
    missing = [[claim.text] for claim in asked if claim.text not in answered]
    return [*tables, *([Table(UNANSWERED, ["claim"], missing)] if missing else [])]


UNANSWERED = "Claims of the paper that these strategies do not answer"


def _cells(claim: Claim) -> list[str]:
    measured = "; ".join(f"{name} {formatted(interval)}" for name, interval in claim.numbers.items())
    return [claim.text + claim.margin, claim.verdict, measured]


# ---------------------------------------------------------------- one function per claim


def _guidance_changes(e: Evidence, text: str, metric: str, sign: float) -> Claim:
    """Guidance changes `metric` in the direction of `sign`."""
    claim = Claim(text)
    if e.base and e.cfg:
        difference = e.difference(e.cfg, e.base, metric)
        claim.numbers["CFG - base"] = e.interval(difference)
        claim.verdict = verdict(e.interval(sign * difference), "holds", "fails")
    return claim


def _guidance_buys_quality(e: Evidence) -> Claim:
    return _guidance_changes(e, "CFG buys quality", e.metrics[1], 1)


def _guidance_costs_diversity(e: Evidence) -> Claim:
    return _guidance_changes(e, "CFG costs diversity", e.metrics[0], -1)


def _not_less(e: Evidence, text: str, metric: str, sign: float) -> Claim:
    """The quality model changes `metric` in the direction of `sign` at least as much as guidance, up to a margin."""
    claim = Claim(text)
    if e.base and e.cfg and e.quality:
        guidance = e.difference(e.cfg, e.base, metric)
        difference = e.difference(e.quality, e.cfg, metric)
        claim.margin = f" (but for {MARGIN:.0%} of what CFG changes, {MARGIN * abs(guidance[0]):.3f})"
        claim.numbers["quality model - CFG"] = e.interval(difference)
        claim.numbers["quality model - base"] = e.interval(e.difference(e.quality, e.base, metric))
        if verdict(e.interval(sign * guidance), "yes", "no") == "yes":
            claim.verdict = verdict(e.interval(sign * (difference + MARGIN * guidance)), "holds", "fails")
        else:
            claim.verdict = "undecided"  # CFG itself makes no certain change to compare with
    return claim


def _distillation_reaches_quality(e: Evidence) -> Claim:
    return _not_less(e, "distillation reaches CFG's quality without CFG", e.metrics[1], 1)


def _distillation_costs_diversity(e: Evidence) -> Claim:
    return _not_less(e, "distillation alone costs as much diversity as CFG", e.metrics[0], -1)


def _reward_brings_diversity_back(e: Evidence) -> Claim:
    claim = Claim("the diversity reward brings diversity back")
    if e.quality and e.diversity:
        for point in e.rewarded:
            difference = e.interval(e.difference(point, e.quality, e.metrics[0]))
            claim.numbers[f"coefficient {point.diversity_coef:g} - quality model"] = difference
        claim.verdict = verdict(difference, "holds", "fails")
        for name, other in (("CFG", e.cfg), ("base", e.base)):
            if other:
                difference = e.interval(e.difference(e.diversity, other, e.metrics[0]))
                claim.numbers[f"coefficient {e.diversity.diversity_coef:g} - {name}"] = difference
        difference = e.interval(e.difference(e.diversity, e.quality, e.metrics[1]))
        claim.numbers["its quality - quality model's"] = difference
    return claim


def _merging_beats_training(e: Evidence) -> Claim:
    claim = Claim("merging beats models trained with coefficients in between, at the same diversity")
    between = [point for point in e.rewarded if point is not e.diversity]
    if e.lerp and between:
        heights = [curve_difference(e.front(e.lerp), e.front([point])) for point in between]
        for point, height in zip(between, heights, strict=True):
            if np.isfinite(height[0]):
                claim.numbers[f"merged - coefficient {point.diversity_coef:g}"] = e.interval(height)
        known = [height for height in heights if np.isfinite(height[0]) and np.isfinite(height).mean() > 0.5]
        if known:
            claim.verdict = verdict(e.interval(np.mean(known, axis=0)), "holds", "fails")
    return claim


def _merging_beats(e: Evidence, text: str, others: Sequence[Point]) -> Claim:
    """
    Whether the merged models' front lies above another, on average over the diversities that both reach. The
    hypervolumes, which also reward reach and the number of points, are reported but do not decide.
    """
    claim = Claim(text)
    if e.lerp and len(others) > 1:
        ours, theirs = e.front(e.lerp), e.front(others)
        heights = curve_difference(ours, theirs)
        claim.verdict = "undecided"
        if np.isfinite(heights[0]) and np.isfinite(heights).mean() > 0.5:
            claim.numbers["mean difference of heights"] = e.interval(heights)
            claim.verdict = verdict(claim.numbers["mean difference of heights"], "holds", "fails")
        reach = ours[..., 0].max(0) - theirs[..., 0].max(0)
        claim.numbers["difference of the highest diversities"] = e.interval(reach)
        worst = np.minimum(ours[:, 0].min(0), theirs[:, 0].min(0))
        claim.numbers["difference of areas"] = e.interval(front_difference(ours, theirs, worst))
    return claim


def _merging_beats_guidance(e: Evidence) -> Claim:
    base = [e.base] if e.base else []
    return _merging_beats(e, "the front of merged models lies above CFG's", [*base, *e.cfg_front])


def _merging_beats_temperature(e: Evidence) -> Claim:
    return _merging_beats(e, "the front of merged models lies above that of temperatures", e.temperature_front)


def _uniform_average(e: Evidence) -> Claim:
    claim = Claim("the uniform average of all models lies above the front of merged pairs")
    if e.uniform and e.pairs:
        height = curve_difference(e.front([e.uniform]), e.front(e.pairs))
        if np.isfinite(height[0]) and np.isfinite(height).mean() > 0.5:
            claim.numbers["uniform - merged pairs, at its diversity"] = e.interval(height)
            claim.verdict = verdict(claim.numbers["uniform - merged pairs, at its diversity"], "holds", "fails")
    return claim


def _above_the_diagonal(e: Evidence) -> Claim:
    claim = Claim("along lambda quality lies above the straight line between the ends, and diversity not below it")
    at = [lambda_of(point) for point in e.lerp]
    if len(at) > 2:
        for name, metric in (("quality", 1), ("diversity", 0)):
            gap = above_diagonal(e.front(e.lerp)[..., metric], at)[1:-1].mean(0)
            claim.numbers[f"{name}, mean between the ends"] = e.interval(gap)
        claim.verdict = verdict(claim.numbers["quality, mean between the ends"], "holds", "fails")
        # Quality above and diversity below the line is a curve parametrised unevenly, not a gain
        if claim.verdict == "holds" and claim.numbers["diversity, mean between the ends"]["high"] < 0:
            claim.verdict = "fails"
    return claim


def _entropy_disagrees(e: Evidence) -> Claim:
    claim = Claim("the rewarded model is more diverse than CFG, and its entropy per token is not higher")
    if e.diversity and e.cfg and "entropy_per_token" in e.diversity.values:
        diverse = e.interval(e.difference(e.diversity, e.cfg, e.metrics[0]))
        entropy = e.interval(e.difference(e.diversity, e.cfg, "entropy_per_token"))
        claim.numbers |= {"diversity, rewarded - CFG": diverse, "entropy, rewarded - CFG": entropy}
        if len(e.points) > 2:
            claim.numbers["correlation over strategies"] = e.correlation(e.points, e.metrics[0], "entropy_per_token")
        signs = {verdict(diverse, "more", "less"), verdict(entropy, "as well", "not")}
        claim.verdict = (
            "holds" if signs == {"more", "not"} else "fails" if signs & {"less", "as well"} else "undecided"
        )
    return claim


ANSWERS: tuple[Callable[[Evidence], Claim], ...] = (
    _guidance_buys_quality,
    _guidance_costs_diversity,
    _distillation_reaches_quality,
    _distillation_costs_diversity,
    _reward_brings_diversity_back,
    _merging_beats_training,
    _merging_beats_guidance,
    _merging_beats_temperature,
    _uniform_average,
    _above_the_diagonal,
    _entropy_disagrees,
)
