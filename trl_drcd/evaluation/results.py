"""
`results.jsonl`: its lines as typed rows, and reading, appending and rewriting them.

No other module parses this format. Every writer holds the folder's lock and reads the file again before rewriting it,
so that concurrent evaluations into one folder do not lose each other's rows.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock

from trl_drcd.evaluation.statistics import Interval
from trl_drcd.files import remove_temporaries, write_text

USUAL_TEMPERATURE = 0.99
"""Default sampling temperature, as in the paper."""
FULL, FORBIDDEN = {errno.ENOSPC, errno.EDQUOT}, {errno.EROFS, errno.EACCES, errno.EPERM}
LATER = (
    "checkpoint",
    "negative_prompt",
    "teacher_negative_prompt",
    "but_seed",
    "but_model",
    "but_row",
    "but_prompts",
    "but_judges",
    "model_digest",
)
"""Fields that earlier versions did not have; `None` is not written."""
ROOM = 2**20
"""Approximate disk space of the results and kept samples of a row, bytes."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    A line of `results.jsonl`: the settings of a row and the metrics of its samples.

    Args:
        strategy (`str`): Name of the strategy; the rows of one strategy form one curve.
        point (`str`): The strategy with its swept value; the same for all training seeds.
        name (`str`): The point, with the training seed if there are several.
        model (`str`): The models, joined by ` + `.
        weights (`tuple[float, ...]`): Interpolation weights of the models; empty for the base alone.
        guidance_scale, temperature (`float`): Sampling settings.
        early_steps, early_guidance_scale: First steps of completions, and their guidance scale.
        diversity_coef, interpolation_weight, training_seed, checkpoint (*optional*): As given by the strategy.
        seed (`int`): Random seed of the samples.
        prompts, samples_per_prompt (`int`): Number of prompts, and of samples of each.
        negative_prompt, teacher_negative_prompt (`str`, *optional*): x^- of the row's guidance, and of the teacher's;
            `None` is the null prompt.
        teacher_guidance_scale (`float`): gamma of the teacher in the metric `kl`.
        passes_per_token (`int`): Forward passes per sampled token: 2 with guidance, else 1.
        kind (`str`): `"text"` or `"music"`.
        metrics (`dict`): Every metric with its interval.
        per_prompt (`dict`): Values per prompt, for the metrics that have them.
        samples (`str`): Name of the folder of the kept samples in `samples/`.
        settings (`str`): Digest of everything that the metrics depend on.
        but_seed (`str`, *optional*): The same without the seed; of further samples of a row it is that of the row.
        but_model (`str`, *optional*): The same without seed and models; of further trainings it is that of the point.
        but_row (`str`, *optional*): Digest of base, prompts, lengths, dtype and judges; the same of rows that can be
            compared.
        but_prompts (`str`, *optional*): The same without the prompts: of rows on further prompts.
        but_judges (`str`, *optional*): Digest of all that the samples depend on: of rows with the same samples.
        model_digest (`str`, *optional*): Digest of the model's weights; of interpolations there is none.
        omega (`float`, *optional*): `quality = omega * adherence + preference`; `None` if quality is adherence.
        more (`dict`): Fields of other versions of this package.
    """

    strategy: str
    point: str
    name: str
    model: str = ""
    weights: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    early_steps: int = 0
    early_guidance_scale: float = 1.0
    temperature: float = USUAL_TEMPERATURE
    diversity_coef: float | None = None
    interpolation_weight: float | None = None
    training_seed: int | None = None
    checkpoint: int | None = None
    negative_prompt: str | None = None
    teacher_negative_prompt: str | None = None
    seed: int = 0
    prompts: int = 0
    samples_per_prompt: int = 0
    teacher_guidance_scale: float = 3.0
    passes_per_token: int = 1
    kind: Literal["text", "music"] = "text"
    metrics: dict[str, Interval] = field(default_factory=dict)
    per_prompt: dict[str, list[float]] = field(default_factory=dict)
    samples: str = ""
    settings: str = ""
    but_seed: str | None = None
    but_model: str | None = None
    but_row: str | None = None
    but_prompts: str | None = None
    but_judges: str | None = None
    model_digest: str | None = None
    omega: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """
        Parse a line; missing fields, as in lines of earlier versions, get their defaults.

        Raises:
            ValueError: If `name`, `metrics` or `per_prompt` is missing.
        """
        name = line.get("name")
        if not isinstance(name, str) or not all(isinstance(line.get(key), dict) for key in ("metrics", "per_prompt")):
            raise ValueError("not a result of an evaluation")
        known = {one.name for one in fields(Result)} - {"more"}
        given = {"strategy": name, "point": name} | {key: line[key] for key in known & line.keys()}
        if "passes_per_token" not in line:
            given["passes_per_token"] = 1 if given.get("guidance_scale", 1) == 1 else 2
        given["weights"] = tuple(given.get("weights", ()))
        return cls(**given, more={key: value for key, value in line.items() if key not in known})

    def to_json(self) -> dict[str, Any]:
        """This row as a line of the file."""
        line = {one.name: getattr(self, one.name) for one in fields(Result)}
        line["weights"] = list(self.weights)
        if "quality" not in self.metrics:
            del line["omega"]
        if not self.early_steps:
            del line["early_steps"], line["early_guidance_scale"]
        for name in LATER:
            if line[name] is None:
                del line[name]
        return line | line.pop("more")

    def is_base(self) -> bool:
        """Whether this is the base model without guidance at the default temperature."""
        return not self.weights and self.guidance_scale == 1 and self.temperature == USUAL_TEMPERATURE

    def is_guided_base(self) -> bool:
        """Whether this is the base with guidance of the same scale in all steps, at the default temperature."""
        usual = not self.weights and not self.early_steps and self.temperature == USUAL_TEMPERATURE
        return usual and self.guidance_scale != 1

    def is_trained(self) -> bool:
        """Whether this is a single model at the end of its training, without guidance at the default temperature."""
        final = len(self.weights) == 1 and self.checkpoint is None
        return final and self.guidance_scale == 1 and self.temperature == USUAL_TEMPERATURE


# ---------------------------------------------------------------- the file


def read_results(file: str | Path) -> list[Result]:
    """
    Read all lines of a `results.jsonl`; [`read_joined`] reads several.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If a line is not a result.
    """
    return _parse(file, Path(file).read_text(encoding="utf-8"))


def _parse(file: str | Path, text: str) -> list[Result]:
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            results.append(Result.from_json(json.loads(line)))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is not a result of an evaluation; remove that line, or the file"
            ) from error
    return results


class ResultsFolder:
    """
    The results in an output folder: `results.jsonl`, and `other_results.jsonl` with rows that were not part of the
    last evaluation.

    Args:
        folder (`str` or `Path`): Created on the first write if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file, self.others = self.folder / "results.jsonl", self.folder / "other_results.jsonl"

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add the remedy to the `OSError` of a folder that cannot be written to."""
        try:
            yield
        except OSError as error:
            full, here = error.errno in FULL, str(error.filename or "").startswith(str(self.folder))
            if not full and not (here and error.errno in FORBIDDEN):
                raise
            remedy = "free some disk space" if full else "give a folder with write permission"
            raise OSError(
                error.errno,
                f"`output_dir={self.folder}` cannot be written to ({error.strerror}): {remedy} and run this again; "
                "rows in results.jsonl are not measured again",
            ) from error

    def check_room(self, rows: int) -> None:
        """
        Check the free disk space for this many more rows, after removing temporary files of processes that have died.

        Raises:
            OSError: If there is too little.
        """
        for folder in (self.folder, self.folder / "samples", *(self.folder / "samples").glob("*/")):
            remove_temporaries(folder)
        if (free := shutil.disk_usage(self.folder).free) < rows * ROOM:
            needed = f"{free >> 20} MiB are free, but {rows} rows need about {rows * ROOM >> 20} MiB"
            raise OSError(errno.ENOSPC, needed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that every writer of the folder takes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".results.lock"):
            yield

    def read(self) -> dict[str, Result]:
        """
        Existing results by their `settings`; an incomplete last line is removed.

        Raises:
            ValueError: If a complete line is not a result.
        """
        with self.locked():
            return {result.settings: result for result in self._read()}

    def append(self, result: Result) -> None:
        """Append a line and flush it to disk; a part of a line, which a process that died has left, is taken off."""
        with self.locked(), open(self.file, "a", encoding="utf-8") as stream:
            _take_off_part_of_a_line(self.file)
            stream.write(json.dumps(result.to_json()) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def arrange(self, results: Sequence[Result]) -> None:
        """Rewrite `results.jsonl` with these results; all others move to `other_results.jsonl`."""
        with self.locked():
            asked = {result.settings for result in results}
            others = {(one.settings, one.name): one for one in self._read() if one.settings not in asked}
            if others or self.others.exists():
                _write(self.others, others.values())
            _write(self.file, results)

    def _read(self) -> list[Result]:
        return [result for file in (self.others, self.file) for result in _read_whole_lines(file)]


def _take_off_part_of_a_line(file: Path) -> None:
    text = file.read_bytes() if file.is_file() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)


def _read_whole_lines(file: Path) -> list[Result]:
    _take_off_part_of_a_line(file)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    results = _parse(file, text)
    if unsettled := next((number for number, one in enumerate(results, 1) if not one.settings), None):
        raise ValueError(f"{file}, line {unsettled} is not a result of an evaluation; remove that line, or the file")
    return results


def _write(file: Path, results: Iterable[Result]) -> None:
    """Replace the file atomically."""
    write_text(file, "".join(json.dumps(result.to_json()) + "\n" for result in results))


def rounded(values: Iterable[float]) -> list[float]:
    """Values per prompt as `results.jsonl` has them, to six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def with_metrics(
    result: Result, metrics: Mapping[str, Interval], per_prompt: Mapping[str, list[float]], omega: float | None
) -> Result:
    """A copy of the row with further metrics and the `omega` of its quality."""
    return replace(
        result,
        metrics={**result.metrics, **metrics},
        per_prompt={**result.per_prompt, **per_prompt},
        omega=omega,
    )
