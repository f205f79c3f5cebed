"""The samples that an evaluation has kept, as a data set: a row for each, with its prompt and what made it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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

RESULTS, SOUNDS, TEXTS = "results.jsonl", "metadata.jsonl", "samples.jsonl"
SHOWN = ("quality", "adherence", "diversity", "kl")
"""Metrics in the card's table."""


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
        [`~trl_drcd.hub.upload.Upload`]: Of a data set: the kept sounds with `metadata.jsonl`, or `samples.jsonl` of
        texts; `results.jsonl`, `front.png`, and a card.

    Raises:
        FileNotFoundError: If no samples were kept (`listen: 0`).
        ValueError: If it is to be public without a licence, or a text holds a token or a path of this machine.
    """
    results = read_results(folder / RESULTS)
    if public and license is None:
        raise ValueError(f"`folder={folder}` is to be public and has no licence; give `license`, such as cc-by-4.0")
    files: dict[str, bytes | Path] = {}
    rows = []
    for result in {result.samples: result for result in results if result.samples}.values():
        for clip in read_clips(folder / "samples" / result.samples):
            row = {"prompt": clip.prompt, "strategy": result.name} | _made_by(result)
            name = str(clip.file.relative_to(folder))
            own_file(folder, name)  # refuses a link out of the folder
            if clip.is_text:
                rows.append(row | {"completion": clip.text()})
            else:
                files[name] = clip.file
                rows.append({"file_name": name} | row)
    if not rows:
        raise FileNotFoundError(f"`folder={folder}` has no kept samples; evaluate again with `listen` above 0")
    index = SOUNDS if files else TEXTS
    files[index] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    files[RESULTS] = content_to_push(RESULTS, folder / RESULTS)
    if (plot := own_file(folder, PLOT)) is not None:
        files[PLOT] = plot
    files[CARD] = str(_card(repo_id, results, rows, index, license, models, PLOT in files)).encode()
    for name in (index, CARD):
        check_text(name, bytes(files[name]).decode())
    return Upload(repo_id, dict(sorted(files.items())), public, "dataset")


def _made_by(result: Result) -> dict[str, object]:
    """What of a row of results says how its samples were made; every row has the same columns."""
    return {
        "guidance_scale": float(result.guidance_scale),
        "temperature": float(result.temperature),
        "interpolation_weight": result.interpolation_weight,
        "diversity_coef": result.diversity_coef,
    }


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
    if not sounds:  # else results.jsonl would be read as rows too
        data["configs"] = [{"config_name": "default", "data_files": TEXTS}]
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
    parts = [
        f"# {markdown_text(repo_id.split('/')[-1])}", about, "## Use", use, "## Metrics", markdown_table(table),
        *([f"![Quality and diversity of models, and the front of the best]({PLOT})"] if plot else []),
        f"Pushed by [trl-drcd](https://pypi.org/project/trl-drcd/) {trl_drcd.__version__}. Paper: "
        f"[Diversity-Rewarded CFG Distillation]({PAPER}).",
    ]  # fmt: skip
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
