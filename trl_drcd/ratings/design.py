"""
The design of a study: which samples are compared, by which rater, in which order and on which side.

A *question* is `quality` or `diversity`; an *item* is one comparison of two models on one prompt; a *book* is the
sequence of items of one rater; a *slot* is an item's place in a book. Every item is in `raters_per_item` different
books. Each book contains all pairs of models equally often, in blocks of one item per pair. Each model of a pair is on
the left in half of its slots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trl_drcd.validation.field_types import check_types

QUESTIONS = ("quality", "diversity")
CLIPS = {"quality": 1, "diversity": 2}  # per side
SECONDS = {"quality": 25, "diversity": 45}
"""Approximate duration of a comparison, seconds."""
# Kinds of attention checks; the right answers are a tie, and that A is better (or more diverse)
CHECKS = ("same", "worse")
# A clip of the design: model, prompt, sample, and whether it is deliberately degraded
Clip = tuple[str, int, int, bool]


@dataclass
class DesignArguments:
    """Arguments of `trl-drcd ratings design`; `--config FILE.yaml`, or the file alone, reads them from a file."""

    evaluation: str = field(metadata={"help": "Folder of an evaluation whose samples were kept."})
    out: str = field(metadata={"help": "Folder of the study, which must not exist yet."})
    models: list[str] = field(
        default_factory=list, metadata={"help": "Names of the strategies to compare; all if empty."}
    )
    quality_prompts: int | None = field(
        default=None,
        metadata={"help": "Number of prompts on which every pair is compared in quality; all if not given."},
    )
    diversity_prompts: int | None = field(
        default=None,
        metadata={"help": "Number of prompts on which every pair is compared in diversity; all if not given."},
    )
    raters_per_item: int = field(default=3, metadata={"help": "Raters of each item; the paper: 3."})
    raters: int = field(default=15, metadata={"help": "Total number of raters, a multiple of raters_per_item."})
    checks: int = field(default=2, metadata={"help": "Attention checks per rater and question."})
    seed: int = field(default=0, metadata={"help": "Random seed of prompts, samples, sides and order."})

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in {"quality_prompts": 0, "diversity_prompts": 0, "raters_per_item": 1, "checks": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if self.raters < self.raters_per_item or self.raters % self.raters_per_item:
            raise ValueError(
                f"`raters` must be a multiple of `raters_per_item={self.raters_per_item}`, got {self.raters}"
            )


@dataclass(frozen=True)
class Item:
    """
    One comparison.

    Args:
        number (`int`): Index of the item.
        question (`str`): `"quality"` or `"diversity"`.
        prompt (`int`): Index of the prompt.
        models (`tuple[str, str]`): A and B.
        clips (`tuple[tuple[Clip, ...], tuple[Clip, ...]]`): Clips of A and of B: one each, or two for diversity.
        check (`str`, *optional*): For an attention check, `"same"` (both sides are identical) or `"worse"` (B is
            worse).
    """

    number: int
    question: str
    prompt: int
    models: tuple[str, str]
    clips: tuple[tuple[Clip, ...], tuple[Clip, ...]]
    check: str | None = None


@dataclass(frozen=True)
class Slot:
    """Position `position` of book `book`: the index of an item, and whether its A is on the left."""

    book: int
    position: int
    item: int
    a_left: bool


@dataclass(frozen=True)
class Design:
    """Items and slots of a study."""

    models: list[str]
    items: list[Item]
    slots: list[Slot]
    raters_per_item: int


def make_design(
    models: Sequence[str],
    prompts: int,
    samples: int,
    prompts_of: Mapping[str, int],
    raters: int = 15,
    raters_per_item: int = 3,
    checks: int = 2,
    seed: int = 0,
) -> Design:
    """
    Make a balanced design, checked by [`check_design`].

    Args:
        models (`Sequence[str]`): Names of at least 2 models.
        prompts (`int`): `P`, the number of prompts with samples.
        samples (`int`): Samples of each model and prompt; at least 2 for the diversity question.
        prompts_of (`Mapping[str, int]`): Question to the number of prompts that every pair of models is compared on.
        raters, raters_per_item, checks, seed (`int`): See [`DesignArguments`].

    Returns:
        [`Design`]: Deterministic for given arguments.

    Raises:
        ValueError: If there are too few models, prompts, samples, or items for the number of raters.
    """
    _check_numbers(models, prompts, samples, prompts_of)
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    books: list[list[int]] = [[] for _ in range(raters)]
    for question in QUESTIONS:
        if not prompts_of.get(question):
            continue
        new = list(
            _items(question, models, rng.permutation(prompts)[: prompts_of[question]], samples, len(items), rng)
        )
        parts = _parts(new, raters, raters_per_item, rng)
        if min(map(len, parts)) < 1:
            raise ValueError(
                f"`raters={raters}` is too many for {len(new)} items of {question}, each seen by {raters_per_item}; "
                f"give at most {len(new) * raters_per_item}"
            )
        items += new
        made = _check_items(question, models, prompts, samples, checks, len(items), rng)
        items += made
        for number, (book, part) in enumerate(zip(books, parts, strict=True)):
            book += _with_checks(part, [item.number for item in _turn(made, checks, number)], rng)
    design = Design(list(models), items, list(_slots(items, books, rng)), raters_per_item)
    check_design(design)
    return design


def _check_numbers(models: Sequence[str], prompts: int, samples: int, prompts_of: Mapping[str, int]) -> None:
    if len(models) < 2 or len(set(models)) < len(models):
        raise ValueError(f"`models` must hold at least 2 different names, got {list(models)}")
    for question, count in prompts_of.items():
        if count > prompts:
            raise ValueError(
                f"`{question}_prompts={count}`, but only samples of {prompts} prompts were kept; give a smaller "
                f"number, or evaluate with `listen={count}`"
            )
        if count and samples < CLIPS[question]:
            raise ValueError(
                f"{question} compares pairs of samples, but only {samples} was kept per prompt; evaluate with "
                "`listen_samples=2` or more, or set `diversity_prompts=0`"
            )
    if not any(prompts_of.values()):
        raise ValueError("`quality_prompts` and `diversity_prompts` are both 0; at least one must be above 0")


def _clips(
    model: str, prompt: int, count: int, samples: int, rng: np.random.Generator, degraded: bool = False
) -> tuple[Clip, ...]:
    """Random samples of one model, without repetition."""
    return tuple((model, prompt, int(sample), degraded) for sample in rng.permutation(samples)[:count])


def _items(
    question: str,
    models: Sequence[str],
    prompts: Iterable[int],
    samples: int,
    first: int,
    rng: np.random.Generator,
) -> Iterator[Item]:
    """Every pair of models on every prompt."""
    count, number = CLIPS[question], first
    for prompt in map(int, prompts):
        for a, b in combinations(models, 2):
            clips = (_clips(a, prompt, count, samples, rng), _clips(b, prompt, count, samples, rng))
            yield Item(number, question, prompt, (a, b), clips)
            number += 1


def _check_items(
    question: str,
    models: Sequence[str],
    prompts: int,
    samples: int,
    checks: int,
    first: int,
    rng: np.random.Generator,
) -> list[Item]:
    """
    Attention checks, alternately an item with identical sides and one whose B is worse: a degraded clip, or for
    diversity the same clip twice.
    """
    made: list[Item] = []
    for number in range(first, first + (max(4, checks) if checks else 0)):
        model, prompt = str(rng.choice(np.array(models, dtype=object))), int(rng.integers(prompts))
        clips = _clips(model, prompt, CLIPS[question], samples, rng)
        check = CHECKS[(number - first) % 2]
        other = clips
        if check == "worse":
            other = (clips[0], clips[0]) if question == "diversity" else ((*clips[0][:3], True),)
        made.append(Item(number, question, prompt, (model, model), (clips, other), check))
    return made


def _turn(checks: Sequence[Item], count: int, book: int) -> list[Item]:
    """The `count` checks of a book, in rotation."""
    return [checks[(book * count + i) % len(checks)] for i in range(count)]


def _parts(items: Sequence[Item], raters: int, raters_per_item: int, rng: np.random.Generator) -> list[list[int]]:
    """
    The item indices of each book. One replicate contains every item once, in blocks of one item per pair, and is cut
    into books; so no book has an item twice, and the numbers of items of two pairs in a book differ by at most one.
    """
    parts: list[list[int]] = []
    for _ in range(raters_per_item):
        pairs: dict[tuple[str, str], list[int]] = defaultdict(list)
        for item in items:
            pairs[item.models].append(item.number)
        columns = [rng.permutation(numbers) for numbers in pairs.values()]
        order = rng.permutation(len(columns))
        sequence = [int(columns[pair][row]) for row in range(len(columns[0])) for pair in order]
        books = raters // raters_per_item
        ends = [round(len(sequence) * book / books) for book in range(books + 1)]
        for start, end in pairwise(ends):
            parts.append(_shuffled_blocks(sequence[start:end], len(columns), rng))
    return parts


def _shuffled_blocks(numbers: list[int], size: int, rng: np.random.Generator) -> list[int]:
    """Shuffle within blocks of `size` items, so that the position in a block does not reveal the pair."""
    blocks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [int(number) for block in blocks for number in rng.permutation(block)]


def _with_checks(part: list[int], checks: list[int], rng: np.random.Generator) -> list[int]:
    """Insert the checks at random positions, never the first."""
    for number in checks:
        part.insert(int(rng.integers(1, len(part) + 1)), number)
    return part


def _slots(items: Sequence[Item], books: Sequence[Sequence[int]], rng: np.random.Generator) -> Iterator[Slot]:
    """Assign sides: of every two consecutive slots of a pair of models, one each way, in random order."""
    waiting: dict[Any, list[bool]] = defaultdict(list)
    for book, numbers in enumerate(books):
        for position, number in enumerate(numbers):
            item = items[number]
            sides = waiting[item.question, item.models, item.check]
            if not sides:
                sides += [bool(side) for side in rng.permutation([True, False])]
            yield Slot(book, position, number, sides.pop())


# ---------------------------------------------------------------- checks of a design


def check_design(design: Design) -> list[tuple[str, str, int, int, float]]:
    """
    Check that a design is balanced.

    Args:
        design ([`Design`]): The design; attention checks are ignored.

    Returns:
        `list[tuple]`: For each question and pair `(question, "A - B", slots, slots with A on the left, mean position
            in
        the books)`, with positions from 0 (first) to 1 (last).

    Raises:
        ValueError: If an item does not have `raters_per_item` raters, a book has an item twice, or pairs or sides are
            not balanced.
    """
    rated = {item.number: item for item in design.items if item.check is None}
    slots = [slot for slot in design.slots if slot.item in rated]
    seen = Counter(slot.item for slot in slots)
    if wrong := [number for number in rated if seen[number] != design.raters_per_item]:
        raise ValueError(f"item {wrong[0]} is in {seen[wrong[0]]} books, expected {design.raters_per_item}")
    if len({(slot.book, slot.item) for slot in slots}) < len(slots):
        raise ValueError("a book has the same item twice")
    length = Counter(slot.book for slot in design.slots)
    table = []
    for question in QUESTIONS:
        pairs: dict[tuple[str, str], list[Slot]] = defaultdict(list)
        for slot in slots:
            if rated[slot.item].question == question:
                pairs[rated[slot.item].models].append(slot)
        _check_books(question, pairs)
        for pair, group in pairs.items():
            left = sum(slot.a_left for slot in group)
            if abs(2 * left - len(group)) > 1:
                raise ValueError(f"{question}: {pair[0]} is on the left of {pair[1]} in {left} of {len(group)} slots")
            place = float(np.mean([slot.position / max(1, length[slot.book] - 1) for slot in group]))
            table.append((question, " - ".join(pair), len(group), left, place))
    return table


def _check_books(question: str, pairs: Mapping[Any, Sequence[Slot]]) -> None:
    """Check that the numbers of items of two pairs in a book differ by at most one."""
    counts: dict[int, list[int]] = defaultdict(list)
    per_pair = [Counter(slot.book for slot in group) for group in pairs.values()]
    for book in {slot.book for group in pairs.values() for slot in group}:
        counts[book] = [count[book] for count in per_pair]
    for book, numbers in counts.items():
        if max(numbers) - min(numbers) > 1:
            raise ValueError(f"{question}: book {book} has between {min(numbers)} and {max(numbers)} items per pair")


def study_size(design: Design) -> str:
    """Size of a study in words: models, items, raters, items and minutes per rater."""
    books = Counter(slot.book for slot in design.slots)
    seconds = sum(SECONDS[design.items[slot.item].question] for slot in design.slots)
    least, most = min(books.values()), max(books.values())
    kinds = Counter((item.question, item.check is None) for item in design.items)
    counts = ", ".join(f"{kinds[question, True]} of {question}" for question in QUESTIONS if kinds[question, True])
    return (
        f"{len(design.models)} models; items: {counts}, each seen by {design.raters_per_item} raters; "
        f"{len(books)} raters rate {least if least == most else f'{least} to {most}'} items each, checks included: "
        f"about {round(seconds / 60 / len(books))} minutes"
    )


def strategies_of(arguments: DesignArguments, samples: Mapping[str, str]) -> list[str]:
    """
    The strategies to compare, among those of the evaluation.

    Args:
        arguments ([`DesignArguments`]): Settings of the study.
        samples (`Mapping[str, str]`): Name of each strategy to the folder of its samples. Strategies may share one: a
            model, and the interpolation that has all its weight.

    Returns:
        `list[str]`: `models`; by default all, the first alone of those that share their samples.

    Raises:
        ValueError: If `models` has an unknown name, or two with the same samples.
    """
    if unknown := [name for name in arguments.models if name not in samples]:
        raise ValueError(f"`models` has unknown names {unknown}; {Path(arguments.evaluation)} has {list(samples)}")
    first: dict[str, str] = {}
    for name in arguments.models or samples:
        same = first.setdefault(samples[name], name)
        if arguments.models and same != name:
            raise ValueError(f"`models` has {same!r} and {name!r}, whose samples are the same; name one of them")
    return arguments.models or list(first.values())
