"""The mergekit recipe, the record (`merge.yaml`) and the model card of a merge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from trl_drcd.files import local_name, write_text
from trl_drcd.markdown import markdown_cell, markdown_table, markdown_text
from trl_drcd.merging.architecture import SpecialToken
from trl_drcd.merging.folders import load_card

PAPER = "https://huggingface.co/papers/2410.06084"
RECORD = "merge.yaml"
LICENCE = ("license", "license_name", "license_link")


def merge_recipe(
    models: Sequence[str], weights: Sequence[float], dtype: str | None = None, names_only: bool = False
) -> str:
    """
    A recipe for `mergekit-yaml`.

    Models of weight 0 are left out; a single remaining model is passed through bit for bit.

    Args:
        models (`Sequence[str]`): Paths or Hub names.
        weights (`Sequence[float]`): One per model; they sum to 1.
        dtype (`str`, *optional*): Data type of the result; the models' own if `None`.
        names_only (`bool`, *optional*, defaults to `False`): Reduce local paths to the folder's name.

    Returns:
        `str`: YAML.
    """
    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    lines = [f"merge_method: {'linear' if len(used) > 1 else 'passthrough'}", "models:"]
    for model, weight in used:
        lines += [f"  - model: {json.dumps(local_name(model) if names_only else model)}"]
        lines += [f"    parameters: {{weight: {weight!r}}}"] if len(used) > 1 else []
    return "\n".join([*lines, *([f"dtype: {dtype}"] if dtype else [])]) + "\n"


def write_record(
    folder: Path,
    parents: Sequence[tuple[str, float]],
    dtype: str | None = None,
    svd_rank: int | None = None,
    base_model: str | Path | None = None,
) -> None:
    """
    Write `merge.yaml`: models and weights of a merge, in the format of `trl-drcd merge --config merge.yaml`.

    Local paths are reduced to the folder's name.

    Args:
        folder (`Path`): Folder of the merged model.
        parents (`Sequence[tuple]`): Name of each parent as given by the user, and its weight.
        dtype (`str`, *optional*): Data type as given by the user.
        svd_rank (`int`, *optional*): Rank as given by the user.
        base_model (`str` or `Path`, *optional*): Base as given by the user, that adapters are merged into.
    """
    names, weights = [local_name(parent) for parent, _ in parents], [weight for _, weight in parents]
    record = {"models": names, "weights": weights, "dtype": dtype, "svd_rank": svd_rank}
    record["base_model"] = None if base_model is None else local_name(str(base_model))
    given = {name: value for name, value in record.items() if value is not None}
    write_text(folder / RECORD, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def write_card(
    folder: Path,
    title: str,
    parents: Sequence[tuple[str, float]],
    sources: Sequence[Path],
    sections: Sequence[str],
    adapter_base: str | None = None,
    path: str | None = None,
) -> None:
    """
    Write the README.md of a merge, with the parents' tags, pipeline tag and licence. Of different licences none is
    written, with a warning: which one holds is for the user to say.

    Args:
        folder (`Path`): Folder of the merged model.
        title (`str`): Heading.
        parents (`Sequence[tuple]`): Name of each parent as given by the user, and its weight.
        sources (`Sequence[Path]`): Folders of the parents.
        sections (`Sequence[str]`): Further paragraphs, in Markdown.
        adapter_base (`str`, *optional*): Base model, if the merge is itself an adapter.
        path (`str`, *optional*): Path of the folder in the example; its name by default.
    """
    names = [(local_name(parent), weight) for parent, weight in parents]
    cards = [parent_card(path / "README.md") for path in sources if (path / "README.md").is_file()]
    data = ModelCardData(
        base_model=local_name(adapter_base) if adapter_base else list(dict.fromkeys(parent for parent, _ in names)),
        base_model_relation="adapter" if adapter_base else "merge",
        library_name="peft" if adapter_base else "transformers",
        pipeline_tag=next((card.pipeline_tag for card in cards if card.pipeline_tag), None),
        **_common_licence(cards),
        tags=list(dict.fromkeys(["merge", "trl-drcd", *(tag for card in cards for tag in card.tags or [])])),
    )
    about = (
        "Linear interpolation of the weights of fine-tuned versions of one base model, as in "
        f"[diversity-rewarded CFG distillation]({PAPER}), Eq. (6). Sample with guidance off."
    )
    if (folder / "codec").is_dir():
        about += " The codec that decodes tokens to audio is in `codec/`."
    rows = [f"| {markdown_cell(parent)} | {weight:g} |" for parent, weight in names]
    table = "\n".join(["| parent | weight |", "|---|---|", *rows])
    record = f"`{RECORD}` has the exact weights."
    use = usage(path or title) if adapter_base and (folder / "generation_config.json").is_file() else []
    body = "\n\n".join([f"# {markdown_text(title)}", about, *use, "## Parents", table, record, *sections])
    write_text(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))


def _common_licence(cards: Sequence[ModelCardData]) -> dict[str, Any]:
    """The licence of the cards that have one, with its name and link, if it is the same."""
    found = [{key: value for key in LICENCE if (value := card.get(key))} for card in cards if card.license]
    if any(other != found[0] for other in found):
        named = " and ".join(sorted({str(each.get("license_name") or each["license"]) for each in found}))
        warnings.warn(
            f"the models have different licences ({named}), so the card of the merge names none; give one that both "
            "allow, in the card or with `trl-drcd push --license`",
            stacklevel=4,
        )
        return {}
    return found[0] if found else {}


def usage(name: str) -> list[str]:
    """Card section on loading an adapter with its own generation config."""
    code = [
        "from trl_drcd.merging import load_adapter_model",
        "",
        f"name = {json.dumps(name)}  # of this folder, or on the Hub",
        "model = load_adapter_model(name)",
    ]
    without = (
        "By default, transformers and PEFT sample with the generation config of the base model. Without trl-drcd, "
        "pass this folder's: `AutoModelForCausalLM.from_pretrained(name, "
        "generation_config=GenerationConfig.from_pretrained(name))`, and the same for MusicGen with "
        "`AutoModelForTextToWaveform`."
    )
    return ["## Use", "\n".join(["```python", *code, "```"]), without]


def parent_card(file: Path) -> ModelCardData:
    """
    Tags, licence and pipeline tag of a model card, if they are strings.

    Raises:
        ValueError: If its metadata is not plain YAML.
    """
    found = load_card(file).data.to_dict()
    kept: dict[str, Any] = {k: v for k in ("pipeline_tag", *LICENCE) if isinstance(v := found.get(k), str)}
    return ModelCardData(**kept, tags=own_tags(found.get("tags")))


def own_tags(tags: object) -> list[str]:
    """Tags without those in which PEFT repeats the base model, which may be a local folder."""
    listed = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    return [tag for tag in listed if isinstance(tag, str) and not tag.startswith("base_model:")]


def special_token_section(tokens: Sequence[SpecialToken]) -> list[str]:
    """Card section on special tokens in which the parents differ; empty if they agree."""
    rows = {token.key: {"id": token.value, "from": token.donor.name, "others": token.have()} for token in tokens}
    return ["## Special tokens", "The parents differ in these.", markdown_table(rows)] if rows else []
