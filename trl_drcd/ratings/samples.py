"""The samples that an evaluation keeps, as files: what people listen to, or read, and rate."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_drcd.evaluation.records import parse_lines
from trl_drcd.prompts import distinct, load_prompts
from trl_drcd.text.reward_models import question_of

SAMPLE = re.compile(r"(\d+)(?:[_-](\d+))?\.(wav|txt)")
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation's kept samples: every strategy on the same prompts.

    Args:
        folder (`Path`): The evaluation's `output_dir`.
        kind (`str`): `"music"` or `"text"`.
        prompts (`list[str]`): The `P` prompts whose samples are kept.
        files (`dict[str, list[list[Path]]]`): Name of each strategy to its files: `P` lists of at least one sample.
        lines (`list[dict]`): The strategies' lines of `results.jsonl`, in the same order.
    """

    folder: Path
    kind: str
    prompts: list[str]
    files: dict[str, list[list[Path]]]
    lines: list[dict[str, Any]] = field(repr=False)

    @property
    def samples(self) -> int:
        """The number of samples that every strategy has of every prompt."""
        return min(len(group) for groups in self.files.values() for group in groups)


def read_evaluation(folder: str | Path, dataset: str | None = None) -> Evaluation:
    """
    The kept samples of an evaluation.

    Args:
        folder (`str` or `Path`): The `output_dir` of `trl-drcd evaluate`: `results.jsonl`, and `samples/` with a
            folder of each strategy (`00.wav` or `00_1.wav`: prompt, and sample where there are several).
        dataset (`str`, *optional*): The evaluation's `dataset`, for folders without `samples/prompts.json`.

    Returns:
        [`Evaluation`]: Strategies in the order of `results.jsonl`.

    Raises:
        FileNotFoundError: If there is no `results.jsonl`, or the samples of a strategy are not there.
        ValueError: If strategies have samples of different prompts, or the prompts are not known.
    """
    root = Path(folder)
    if not (root / "results.jsonl").is_file():
        raise FileNotFoundError(
            f"`evaluation={folder}` has no results.jsonl; give the `output_dir` of `trl-drcd evaluate`"
        )
    lines = parse_lines(root / "results.jsonl", (root / "results.jsonl").read_text(), {"name", "samples", "metrics"})
    files = {str(line["name"]): sample_files(root / "samples" / Path(line["samples"]).name) for line in lines}
    if empty := [name for name, groups in files.items() if not groups]:
        raise FileNotFoundError(
            f"`evaluation={folder}` has no samples of {empty}; evaluate with `listen` above 0, and keep samples/"
        )
    if len(counts := {len(groups) for groups in files.values()}) > 1:
        raise ValueError(
            f"`evaluation={folder}` has samples of {sorted(counts)} prompts; evaluate all strategies alike"
        )
    prompts = _prompts(root, counts.pop(), int(lines[0].get("prompts", 0)), dataset)
    kind = "text" if next(iter(files.values()))[0][0].suffix == ".txt" else "music"
    return Evaluation(root, kind, prompts, files, lines)


def sample_files(folder: Path) -> list[list[Path]]:
    """The files of one strategy, those of a prompt together, in order."""
    groups: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("*"):
        if match := SAMPLE.fullmatch(path.name):
            groups.setdefault(int(match[1]), []).append((int(match[2] or 0), path))
    return [[path for _, path in sorted(groups[prompt])] for prompt in sorted(groups)]


def _prompts(root: Path, kept: int, evaluated: int, dataset: str | None) -> list[str]:
    """The prompts whose samples are kept: listed beside them, or every n-th of the data set."""
    listed = root / "samples" / PROMPTS
    if listed.is_file():
        prompts: Sequence[Any] = json.loads(listed.read_text())
    elif dataset is None:
        raise ValueError(f"`evaluation={root}` does not list its prompts; give its `dataset` too")
    else:
        all_prompts = distinct(load_prompts("dataset", dataset, "test")["prompt"], evaluated)
        prompts = all_prompts[:: max(1, evaluated // kept)][:kept]
    if len(prompts) != kept:
        raise ValueError(f"`evaluation={root}` has samples of {kept} prompts, and {len(prompts)} prompts are known")
    return [prompt if isinstance(prompt, str) else question_of(prompt) for prompt in prompts]
