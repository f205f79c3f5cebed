"""Recipes in mergekit's form, and model cards of merges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_drcd.files import local_name
from trl_drcd.merging.folders import load_card

PAPER = "https://huggingface.co/papers/2410.06084"


def merge_recipe(
    models: Sequence[str], weights: Sequence[float], dtype: str | None = None, names_only: bool = False
) -> str:
    """
    A recipe for `mergekit-yaml`.

    Models of weight 0 are left out; a single one is passed through, which keeps its bits.

    Args:
        models (`Sequence[str]`): Paths or hub names.
        weights (`Sequence[float]`): They sum to 1.
        dtype (`str`, *optional*): Data type of the result; the models' own if `None`.
        names_only (`bool`, *optional*, defaults to `False`): Without the folders that local models lie in.

    Returns:
        `str`: YAML.
    """
    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    lines = [f"merge_method: {'linear' if len(used) > 1 else 'passthrough'}", "models:"]
    for model, weight in used:
        lines += [f"  - model: {json.dumps(local_name(model) if names_only else model)}"]
        lines += [f"    parameters: {{weight: {weight!r}}}"] if len(used) > 1 else []
    return "\n".join([*lines, *([f"dtype: {dtype}"] if dtype else [])]) + "\n"


def merge_card(
    name: str,
    parents: Sequence[tuple[str, float]],
    folders: Sequence[Path],
    sections: Sequence[str],
    adapter_base: str | None = None,
) -> ModelCard:
    """
    The README.md of a merge; tags, licence and pipeline are the parents'.

    Args:
        name (`str`): Title.
        parents (`Sequence[tuple]`): What the user calls each parent, and its weight.
        folders (`Sequence[Path]`): Where the parents are.
        sections (`Sequence[str]`): Further paragraphs.
        adapter_base (`str`, *optional*): Base model, where the merge is itself an adapter.

    Returns:
        `ModelCard`: YAML header and text.
    """
    names = [(local_name(parent), weight) for parent, weight in parents]
    cards: list[Any] = [load_card(path / "README.md").data for path in folders if (path / "README.md").is_file()]
    tags = ["merge", "trl-drcd", *(tag for card in cards for tag in card.get("tags") or [])]
    data = ModelCardData(
        base_model=local_name(adapter_base) if adapter_base else list(dict.fromkeys(parent for parent, _ in names)),
        base_model_relation="adapter" if adapter_base else "merge",
        library_name="peft" if adapter_base else "transformers",
        pipeline_tag=next((card.pipeline_tag for card in cards if card.get("pipeline_tag")), None),
        license=next((card.license for card in cards if card.get("license")), None),
        tags=list(dict.fromkeys(tags)),
    )
    about = (
        "Weights interpolated linearly between fine-tunings of one base model, as in "
        f"[diversity-rewarded CFG distillation]({PAPER}), Eq. (6). Sample with guidance off."
    )
    if any((folder / "codec").is_dir() for folder in folders):
        about += " The codec that makes audio of the tokens is in `codec/`."
    table = "\n".join(
        ["| parent | weight |", "|---|---|", *(f"| {parent} | {weight:g} |" for parent, weight in names)]
    )
    body = "\n\n".join([f"# {name}", about, "## Parents", table, *sections])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
