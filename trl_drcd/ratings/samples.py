"""Read the samples that an evaluation kept, for raters to listen to or read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl_drcd.evaluation.listening import Clip, read_clips
from trl_drcd.evaluation.report import request_of
from trl_drcd.evaluation.results import Result, read_results


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation's kept samples: every strategy on the same prompts.

    Args:
        folder (`Path`): The evaluation's `output_dir`.
        kind (`str`): `"music"` or `"text"`.
        prompts (`list[str]`): The `P` prompts whose samples were kept.
        files (`dict[str, list[list[Path]]]`): Name of each strategy to its files: `P` lists of at least one sample.
        results (`list[Result]`): The strategies' lines of `results.jsonl`, in the same order.
    """

    folder: Path
    kind: str
    prompts: list[str]
    files: dict[str, list[list[Path]]]
    results: list[Result] = field(repr=False)

    @property
    def samples(self) -> int:
        """Number of samples that every strategy has of every prompt."""
        return min(len(group) for groups in self.files.values() for group in groups)


def read_evaluation(folder: str | Path) -> Evaluation:
    """
    Read the kept samples of an evaluation.

    Args:
        folder (`str` or `Path`): The `output_dir` of `trl-drcd evaluate`, with `results.jsonl` and a folder per
            strategy in `samples/`.

    Returns:
        [`Evaluation`]: Strategies in the order of `results.jsonl`.

    Raises:
        FileNotFoundError: If `results.jsonl` or the samples of a strategy are missing.
        ValueError: If strategies have samples of different prompts.
    """
    root = Path(folder)
    if not (root / "results.jsonl").is_file():
        raise FileNotFoundError(
            f"`evaluation={folder}` has no results.jsonl; give the `output_dir` of `trl-drcd evaluate`"
        )
    results = read_results(root / "results.jsonl")
    clips = {result.name: _by_prompt(read_clips(root / "samples" / Path(result.samples).name)) for result in results}
    if empty := [name for name, groups in clips.items() if not groups]:
        raise FileNotFoundError(
            f"`evaluation={folder}` has no samples of {empty}; evaluate with `listen` above 0, and do not delete "
            "samples/"
        )
    first = next(iter(clips.values()))
    if other := next((name for name, groups in clips.items() if list(groups) != list(first)), None):
        raise ValueError(
            f"`evaluation={folder}` has samples of {other!r} for other prompts than of the first strategy; evaluate "
            "all with the same `listen`"
        )
    files = {name: [[clip.file for clip in group] for group in groups.values()] for name, groups in clips.items()}
    every = [file for groups in files.values() for group in groups for file in group]
    if missing := [file for file in every if not file.exists()]:
        raise FileNotFoundError(f"`evaluation={folder}` lacks {missing[0]}, listed in samples.jsonl; evaluate again")
    prompts = [request_of(group[0].prompt) for group in first.values()]
    return Evaluation(root, results[0].kind, prompts, files, results)


def _by_prompt(clips: list[Clip]) -> dict[str, list[Clip]]:
    """The clips of each prompt, texts or conversations, in order."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(repr(clip.prompt), []).append(clip)
    return groups
