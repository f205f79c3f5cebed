"""Power analysis: ratings needed to detect a win rate. The paper reports 0.57 and 0.51 of at most 300 ratings each."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

from trl_drcd.evaluation.tables import Table
from trl_drcd.ratings.statistics import outcome_variance
from trl_drcd.validation.field_types import check_types

NORMAL = NormalDist()


@dataclass
class PowerArguments:
    """Arguments of `trl-drcd ratings power`."""

    win_rate: float = field(default=0.57, metadata={"help": "The win rate to distinguish from 0.5, between 0 and 1."})
    ties: float = field(default=0.2, metadata={"help": "Share of ties."})
    design_effect: float = field(
        default=1.0,
        metadata={"help": "Variance of a win rate over that of independent ratings; a study's report measures it."},
    )
    power: float = field(default=0.8, metadata={"help": "Probability of detecting the difference."})
    level: float = field(default=0.95, metadata={"help": "Confidence level of the interval that must exclude 0.5."})

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.win_rate < 1 or self.win_rate == 0.5:
            raise ValueError(f"`win_rate` must be between 0 and 1 and not 0.5, got {self.win_rate}")
        most = 2 * min(self.win_rate, 1 - self.win_rate)
        if not 0 <= self.ties < most:
            raise ValueError(f"`ties` must be at least 0 and below {most:g} at this win rate, got {self.ties}")
        if self.design_effect < 1:
            raise ValueError(f"`design_effect` must be at least 1, got {self.design_effect}")
        for name in ("power", "level"):
            if not 0.5 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0.5 and below 1, got {getattr(self, name)}")


def ratings_needed(
    win_rate: float, ties: float = 0.0, power: float = 0.8, level: float = 0.95, design_effect: float = 1.0
) -> int:
    """
    Number of ratings of one pair of models needed to distinguish a win rate from 0.5 with a two-sided normal test.

    `n = design_effect * ((z_level * s0 + z_power * s1) / (win_rate - 0.5)) ** 2`, with `s0` and `s1` the standard
    deviations of an outcome (1, 0.5 or 0) at 0.5 and at the win rate.

    Args:
        win_rate (`float`): True win rate in `(0, 1)`, not 0.5.
        ties (`float`, *optional*, defaults to 0.0): Share of ties, which reduce the variance of outcomes.
        power (`float`, *optional*, defaults to 0.8): Probability of detecting the difference.
        level (`float`, *optional*, defaults to 0.95): Confidence level.
        design_effect (`float`, *optional*, defaults to 1.0): Variance over that of independent ratings.

    Returns:
        `int`: Number of ratings, rounded up.

    Raises:
        ValueError: If a value is out of range.
    """
    PowerArguments(win_rate, ties, design_effect, power, level)
    null, true = outcome_variance(0.5, ties) ** 0.5, outcome_variance(win_rate, ties) ** 0.5
    z = NORMAL.inv_cdf((1 + level) / 2) * null + NORMAL.inv_cdf(power) * true
    return -int(-design_effect * (z / (win_rate - 0.5)) ** 2 // 1)


def power_of(
    ratings: int, win_rate: float, ties: float = 0.0, level: float = 0.95, design_effect: float = 1.0
) -> float:
    """
    Probability that this many ratings distinguish a true win rate from 0.5; see [`ratings_needed`].

    Args:
        ratings (`int`): Number of ratings of one pair of models, at least 1.
        win_rate, ties, level, design_effect (`float`): As for [`ratings_needed`].

    Returns:
        `float`: In `[0, 1]`.

    Raises:
        ValueError: If a value is out of range.
    """
    PowerArguments(win_rate, ties, design_effect, level=level)
    scale = (design_effect / ratings) ** 0.5
    null, true = outcome_variance(0.5, ties) ** 0.5 * scale, outcome_variance(win_rate, ties) ** 0.5 * scale
    edge, shift = NORMAL.inv_cdf((1 + level) / 2) * null, win_rate - 0.5
    return 1 - NORMAL.cdf((edge - shift) / true) + NORMAL.cdf((-edge - shift) / true)


def power_table(arguments: PowerArguments) -> Table:
    """Table of the ratings of a pair that are needed, and of the power of 150 and 300 ratings, as in the paper."""
    settings = {"ties": arguments.ties, "level": arguments.level, "design_effect": arguments.design_effect}
    rates = sorted({arguments.win_rate, 0.55, 0.6, 0.65}, key=lambda rate: abs(rate - 0.5))
    rows = []
    for rate in rates:
        needed = ratings_needed(rate, power=arguments.power, **settings)
        chances = [f"{power_of(count, rate, **settings):.2f}" for count in (150, 300)]
        rows.append([f"{rate:g}", str(needed), *chances])
    return Table("", ["win rate", f"ratings for power {arguments.power:g}", "power of 150", "power of 300"], rows)
