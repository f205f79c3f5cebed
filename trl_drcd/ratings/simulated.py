"""
Simulated raters, a known ground truth plus noise, to test a study from end to end. Their ratings are never results
about people, and are labelled as simulated in the database, tables, plots and CSV files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_drcd.evaluation.listening import heard
from trl_drcd.ratings.samples import read_evaluation
from trl_drcd.ratings.store import FREE_BOOKS, Answer, Study
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import short_repr


@dataclass
class SimulateArguments:
    """Arguments of `trl-drcd ratings simulate`."""

    study: str = field(metadata={"help": "Folder of the study, without ratings by people."})
    abilities: list[float] = field(
        default_factory=list,
        metadata={"help": "True Bradley-Terry ability of each model, nats, for both questions, in the study's order."},
    )
    judges: list[str] = field(
        default_factory=list,
        metadata={"help": "Instead of abilities: metrics of results.jsonl, one for quality and one for diversity."},
    )
    steepness: float = field(
        default=2.0, metadata={"help": "With judges: nats of ability per standard deviation of the metric."}
    )
    prompt_noise: float = field(
        default=0.5, metadata={"help": "Standard deviation over prompts of a model's ability, nats."}
    )
    ties: float = field(default=0.2, metadata={"help": "Largest share of ties; fewer if one side is clearly better."})
    inattention: float = field(default=0.05, metadata={"help": "Share of random answers."})
    raters: int | None = field(default=None, metadata={"help": "Number of raters; all free places if not given."})
    seed: int = field(default=0, metadata={"help": "Random seed of the raters."})

    def __post_init__(self) -> None:
        check_types(self)
        if bool(self.abilities) == bool(self.judges) or len(self.judges) not in (0, 2):
            raise ValueError(
                "give either `abilities`, one for each model, or two `judges`, for quality and for diversity; got "
                f"`abilities={self.abilities}` and `judges={self.judges}`"
            )
        for name, most in {"ties": 1.0, "inattention": 1.0, "prompt_noise": np.inf, "steepness": np.inf}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` must be between 0 and {most:g}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Truth:
    """
    Ground truth of simulated raters.

    Args:
        abilities (`dict[str, np.ndarray]`): Question to Bradley-Terry abilities of each model on each prompt, nats,
            `(P, M)`.
        models (`list[str]`): Names of the `M` models.
        ties (`float`): Share of ties between equal abilities.
        inattention (`float`): Share of random answers.
    """

    abilities: dict[str, np.ndarray]
    models: list[str]
    ties: float = 0.2
    inattention: float = 0.0

    def outcome(self, question: str, prompt: int, a: str, b: str, rng: np.random.Generator) -> float:
        """
        Draw an outcome for A: 1, 0.5 or 0. With a tie as half a win, its expectation is the Bradley-Terry probability
        `1 / (1 + exp(b - a))` for any share of ties, so a report must recover `abilities`.
        """
        ability = dict(zip(self.models, self.abilities[question][prompt], strict=True))
        chance = 1 / (1 + np.exp(ability[b] - ability[a]))
        tie = self.ties * 2 * min(chance, 1 - chance)
        return float(rng.choice([1.0, 0.5, 0.0], p=[chance - tie / 2, tie, 1 - chance - tie / 2]))


def known_truth(
    models: Sequence[str], prompts: int, abilities: Sequence[float], arguments: SimulateArguments
) -> Truth:
    """
    Ground truth from given abilities, the same for both questions, plus noise per prompt.

    Raises:
        ValueError: If there is not one ability per model.
    """
    if len(abilities) != len(models):
        raise ValueError(
            f"`abilities` must have one value for each of {list(models)}, got {short_repr(list(abilities))}"
        )
    noise = np.random.default_rng(arguments.seed).standard_normal((2, prompts, len(models))) * arguments.prompt_noise
    values = np.asarray(abilities, dtype=float)
    of_question = {"quality": values + noise[0], "diversity": values + noise[1]}
    return Truth(of_question, list(models), arguments.ties, arguments.inattention)


def judged_truth(study: Study, arguments: SimulateArguments) -> Truth:
    """
    Ground truth from the evaluation's own metrics, standardised over models and prompts.

    Raises:
        ValueError: If a metric was not measured for every model, or on other prompts.
    """
    evaluation = read_evaluation(study.about["evaluation"])
    study.check_prompts(evaluation.prompts)
    per_prompt = {result.name: result.per_prompt for result in evaluation.results}
    models, count = study.about["models"], len(evaluation.prompts)
    of_question = {}
    for question, metric in zip(("quality", "diversity"), arguments.judges, strict=True):
        if missing := [name for name in models if metric not in per_prompt[name]]:
            raise ValueError(f"`judges` has {metric!r}, which was not measured for {missing}")
        values = np.array([per_prompt[name][metric] for name in models]).T
        kept = values[heard(len(values), count)]
        of_question[question] = arguments.steepness * (kept - kept.mean()) / max(kept.std(), 1e-12)
    return Truth(of_question, models, arguments.ties, arguments.inattention)


def simulate(study: Study, arguments: SimulateArguments) -> int:
    """
    Let simulated raters join a study and rate all their items, through the same calls as the app.

    Args:
        study ([`Study`]): A study without human raters.
        arguments ([`SimulateArguments`]): Number of raters, and their ground truth.

    Returns:
        `int`: Number of new ratings.

    Raises:
        ValueError: If the study has human raters or too few free places, or the ground truth does not match its
            models.
    """
    study = Study(study.folder, power_safe=False)
    models, prompts = study.about["models"], 1 + max(row["prompt"] for row in study.rows("SELECT prompt FROM items"))
    if arguments.judges:
        truth = judged_truth(study, arguments)
    else:
        truth = known_truth(models, prompts, arguments.abilities, arguments)
    free = study.rows(f"SELECT count(*) AS n FROM ({FREE_BOOKS})")[0]["n"]
    count = free if arguments.raters is None else arguments.raters
    if not 0 < count <= free:
        raise ValueError(f"`raters={count}` must be between 1 and the number of free places, {free}")
    rng, new = np.random.default_rng(arguments.seed + 1), 0
    for _ in range(count):
        number = study.rows("SELECT count(*) AS n FROM raters")[0]["n"] + 1
        new += _rate_all(study, study.join(f"simulated {number}", simulated=True), truth, rng)
    return new


def _rate_all(study: Study, link: str, truth: Truth, rng: np.random.Generator) -> int:
    new = 0
    items = {row["slot"]: row for row in study.rows("SELECT * FROM slots JOIN items USING (item)")}
    while task := study.next_task(link):
        new += study.rate(link, task.slot, answer_to(items[task.slot], truth, rng), must_play=False)
    return new


def answer_to(item: Mapping[str, Any], truth: Truth, rng: np.random.Generator) -> Answer:
    """Draw a simulated rater's answer to an item, with sides as shown."""
    if rng.random() < truth.inattention:
        won: float = rng.choice([1.0, 0.5, 0.0])
    elif item["check_kind"]:
        won = 0.5 if item["check_kind"] == "same" else 1.0
    else:
        won = truth.outcome(item["question"], item["prompt"], item["model_a"], item["model_b"], rng)
    gap = 0 if won == 0.5 else int(rng.integers(1, 3))
    towards_a = gap if won == 1 else -gap
    towards_left = towards_a if item["a_left"] else -towards_a
    if item["question"] == "diversity":
        return Answer(preference=3 - towards_left)
    worse = int(rng.integers(1, 6 - gap))
    return Answer(left=worse + max(0, towards_left), right=worse + max(0, -towards_left))
