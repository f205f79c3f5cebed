"""The samples that an evaluation has kept, as a data set: a row for each, with its prompt and what made it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Features, Value
from huggingface_hub import DatasetCard, DatasetCardData

import trl_drcd
from trl_drcd.cards import PAPER
from trl_drcd.evaluation.listening import read_clips
from trl_drcd.evaluation.results import Result, read_results
from trl_drcd.files import own_file
from trl_drcd.hub.privacy import check_text, content_to_push
from trl_drcd.hub.selection import CARD, PLOT
from trl_drcd.hub.upload import Upload
from trl_drcd.markdown import markdown_table, markdown_text

RESULTS, SOUNDS, TEXTS = "results.jsonl", "samples.parquet", "samples.jsonl"
SHOWN = ("quality", "adherence", "diversity", "kl")
"""Metrics in the card's table."""
MADE_BY = (
    "guidance_scale", "early_steps", "early_guidance_scale", "temperature", "interpolation_weight", "diversity_coef",
    "checkpoint",
)  # fmt: skip
"""What of a row of results says how its samples were made, besides `negative_prompt`: numbers, or null."""


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is that of an evaluation, and no model."""
    models = ("config.json", "adapter_config.json")
    return (folder / RESULTS).is_file() and not any((folder / name).is_file() for name in models)


def prepare_samples(
    folder: Path, repo_id: str, public: bool = False, license: str | None = None, models: Sequence[str] = ()
) -> Upload:
    """
    What would be uploaded of an evaluation; nothing is sent, and the folder is not changed.

    Args:
        folder (`Path`): Of `trl-drcd evaluate`.
        repo_id (`str`): `owner/name`.
        public (`bool`, *optional*, defaults to `False`): Whether anybody may see it.
        license (`str`, *optional*): Identifier; needed where `public`.
        models (`Sequence[str]`, *optional*): Names on the Hub of what was sampled, for the card.

    Returns:
        [`~trl_drcd.hub.upload.Upload`]: Of a data set: `samples.parquet` with the kept sounds (column `audio`), or
        `samples.jsonl` of texts; `results.jsonl`, `front.png`, and a card.

    Raises:
        FileNotFoundError: If no samples were kept (`listen: 0`).
        ValueError: If it is to be public without a licence, or a text holds a token or a path of this machine.
    """
    results = read_results(folder / RESULTS)
    if public and license is None:
        raise ValueError(f"`folder={folder}` is to be public and has no licence; give `license`, such as cc-by-4.0")
    rows: list[dict[str, Any]] = []
    sounds: list[dict[str, Any]] = []  # WAV files, in the order of `rows`
    for result in {result.samples: result for result in results if result.samples}.values():
        for clip in read_clips(folder / "samples" / result.samples):
            row = {"prompt": clip.prompt, "strategy": result.name} | _made_by(result)
            own_file(folder, str(clip.file.relative_to(folder)))  # refuses a link out of the folder
            if clip.is_text:
                rows.append(row | {"completion": clip.text()})
            else:
                rows.append(row)
                sounds.append({"bytes": clip.file.read_bytes(), "path": clip.file.name})
    if not rows:
        raise FileNotFoundError(f"`folder={folder}` has no kept samples; evaluate again with `listen` above 0")
    index = SOUNDS if sounds else TEXTS
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files: dict[str, bytes | Path] = {index: _parquet(rows, sounds) if sounds else text.encode()}
    files[RESULTS] = content_to_push(RESULTS, folder / RESULTS)
    if (plot := own_file(folder, PLOT)) is not None:
        files[PLOT] = plot
    files[CARD] = str(_card(repo_id, results, rows, index, license, models, PLOT in files)).encode()
    check_text(index, text)
    check_text(CARD, bytes(files[CARD]).decode())
    return Upload(repo_id, dict(sorted(files.items())), public, "dataset")


def _parquet(rows: Sequence[dict[str, Any]], sounds: Sequence[dict[str, Any]]) -> bytes:
    """A Parquet file of rows and their sounds; encoded as they are, since `Audio` encodes only with torchcodec."""
    columns = dict.fromkeys(("prompt", "strategy", "negative_prompt"), Value("string")) | dict.fromkeys(
        MADE_BY, Value("float64")
    )
    stored = {"bytes": Value("binary"), "path": Value("string")}
    data = [row | {"audio": sound} for row, sound in zip(rows, sounds, strict=True)]
    table = Dataset.from_list(data, features=Features(columns | {"audio": stored})).cast_column("audio", Audio())
    file = BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def _made_by(result: Result) -> dict[str, float | str | None]:
    """`negative_prompt` and the values of `MADE_BY`; never integers, so that every row's columns have one type."""
    numbers = {name: None if (value := getattr(result, name)) is None else float(value) for name in MADE_BY}
    return {"negative_prompt": result.negative_prompt, **numbers}


def _card(
    repo_id: str,
    results: Sequence[Result],
    rows: Sequence[dict[str, object]],
    index: str,
    license: str | None,
    models: Sequence[str],
    plot: bool,
) -> DatasetCard:
    sounds = index == SOUNDS
    data = DatasetCardData(
        license=license,
        task_categories=["text-to-audio" if sounds else "text-generation"],
        tags=["trl-drcd", *(["audio", "music"] if sounds else [])],
    )
    data["configs"] = [{"config_name": "default", "data_files": index}]  # else results.jsonl would be read as rows too
    if models:
        data["source_models"] = list(models)
    table = {
        result.name: {key: result.metrics[key]["mean"] for key in SHOWN if key in result.metrics} for result in results
    }
    one = results[0]
    about = (
        f"{len(rows)} samples of {len(table)} ways to sample, on the same held-out prompts with the same seed: what "
        f"`trl-drcd evaluate` kept to listen to or read. The metrics are over {one.prompts} prompts with "
        f"{one.samples_per_prompt} samples each; `{RESULTS}` has them all, with 95 % intervals."
    )
    use = f'```python\nfrom datasets import load_dataset\n\nsamples = load_dataset("{repo_id}", split="train")\n```'
    if sounds:
        use += (
            "\n\nThe column `audio` is decoded by `torchcodec`. Without it, "
            '`samples.cast_column("audio", datasets.Audio(decode=False))` gives the bytes of the WAV files.'
        )
    parts = [
        f"# {markdown_text(repo_id.split('/')[-1])}", about, "## Use", use, "## Metrics", markdown_table(table),
        *([f"![Quality and diversity of models, and the front of the best]({PLOT})"] if plot else []),
        f"Pushed by [trl-drcd](https://pypi.org/project/trl-drcd/) {trl_drcd.__version__}. Paper: "
        f"[Diversity-Rewarded CFG Distillation]({PAPER}).",
    ]  # fmt: skip
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
