"""Model cards for the Hub: the folder's own card, completed with metadata, widgets, samples and metrics."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import trl_drcd
from trl_drcd.cards import PAPER
from trl_drcd.hub.privacy import is_local
from trl_drcd.hub.selection import CARD, PLOT, Kind, kind_of, read_samples
from trl_drcd.markdown import markdown_cell, markdown_text
from trl_drcd.merging.cards import LICENCE, RECORD, own_tags
from trl_drcd.merging.folders import load_card
from trl_drcd.validation.saved_files import read_json

LIBRARIES = ("torch", "transformers", "trl", "peft")
NAME_LINE = re.compile(r'^name = ".*"  # of this folder, or on the Hub$', re.MULTILINE)
OWN_CLASS = re.compile(r"(\w+\.from_pretrained\()\"[^\"\n]*\"\)")


@dataclass(frozen=True)
class CardFacts:
    """
    Facts that are added to the folder's own card.

    Args:
        repo_id (`str`): Name of the repository, `owner/name`.
        base_model (`Sequence[str]`, *optional*): Hub names of the base models; those of the folder's card if `None`.
        license (`str`, *optional*): Licence identifier; that of the folder's card if `None`.
        datasets (`Sequence[str]`): Hub names of data sets, in addition to those of the folder's card.
        command (`str`, *optional*): Command that produced the model.
        evaluation (`Sequence[EvalResult]`): Metrics for `model-index`.
        sections (`Sequence[str]`): Further sections, in Markdown.
        plot (`bool`): Whether `front.png` is pushed.
    """

    repo_id: str
    base_model: Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    command: str | None = None
    evaluation: Sequence[EvalResult] = ()
    sections: Sequence[str] = field(default=())
    plot: bool = False


def complete_card(folder: Path, facts: CardFacts) -> ModelCard:
    """
    Make the model card for the Hub.

    Args:
        folder (`Path`): Folder of the model; the content of its `README.md`, if any, is kept.
        facts ([`CardFacts`]): Facts to add.

    Returns:
        `ModelCard`: Metadata with `base_model` and its relation, licence, data sets, `model-index` and widgets; text
        with usage from the Hub, samples, the plot, how the model was made, and the paper.

    Raises:
        ValueError: If the card names its base by a local folder and `base_model` is not given, or its metadata is
            broken.
    """
    kind, file = kind_of(folder), folder / CARD
    card = load_card(file) if file.is_file() else ModelCard("---\n{}\n---\n\n# " + markdown_text(_name(facts)) + "\n")
    header, text = card.data.to_dict(), card.text.strip()
    record = merge_record(folder)
    parents = merged_from(record)
    names = _base_names(header, facts)
    header |= {"base_model": names[0] if len(names) == 1 else names} if names else {}
    if names:
        header["base_model_relation"] = "adapter" if kind == "adapter" else "merge" if parents else "finetune"
    if facts.license and facts.license != header.get("license"):
        header = {key: value for key, value in header.items() if key not in LICENCE} | {"license": facts.license}
    if datasets := list(dict.fromkeys([*_listed(header.get("datasets")), *facts.datasets])):
        header["datasets"] = datasets
    header["library_name"] = header.get("library_name") or _library(kind)
    header["tags"] = list(dict.fromkeys([*own_tags(header.get("tags")), "trl-drcd"]))
    samples = read_samples(folder)
    if widgets := [_widget(row) for row in samples if "prompt" in row]:
        header["widget"] = widgets
    if parents and len(parents) == 2:
        header["interpolation_weight"] = parents[1][1]
    data = ModelCardData(**header)
    if facts.evaluation:
        data.model_name, data.eval_results = facts.repo_id, list(facts.evaluation)
    parts = [
        _with_name(text, facts.repo_id, kind, folder),
        *_missing_use(text, kind, folder, facts.repo_id),
        *_samples_section(samples, facts.repo_id),
        *facts.sections,
        *([f"![Quality and diversity of models, and the front of the best]({PLOT})"] if facts.plot else []),
        _made_section(facts, record, names if kind == "model" else []),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def merge_record(folder: Path) -> dict[str, Any]:
    """
    The record of a merge, `merge.yaml`; empty without that file.

    Raises:
        ValueError: If it has no `models` and as many `weights`.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not merged_from(record):
            raise ValueError("it names no models")
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} must hold `models` and as many `weights`; merge again") from error
    return dict(record)


def merged_from(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Parents of a merge and their weights, from its record; empty if that is."""
    if not record:
        return []
    return [(str(name), float(weight)) for name, weight in zip(record["models"], record["weights"], strict=True)]


def has_license(card: ModelCard) -> bool:
    """Whether the card's metadata has a licence."""
    return bool(card.data.to_dict().get("license"))


# ---------------------------------------------------------------- header


def _name(facts: CardFacts) -> str:
    return facts.repo_id.split("/")[-1]


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _base_names(header: dict[str, Any], facts: CardFacts) -> list[str]:
    """Hub names of the base models."""
    if facts.base_model is not None:
        return list(facts.base_model)
    named = _listed(header.get("base_model"))
    if unknown := [name for name in named if "/" not in name or is_local(name)]:
        raise ValueError(
            f"the card names its base model {', '.join(unknown)}, which is not a name on the Hub; give `base_model` "
            f"({len(named)}), such as {' '.join(f'user/{Path(name).name}' for name in named)}"
        )
    return named


def _library(kind: Kind) -> str:
    return {"adapter": "peft", "model": "transformers"}.get(kind, "trl-drcd")


def _widget(row: dict[str, object]) -> dict[str, object]:
    output = {"url": f"samples/{quote(str(row['file']))}"} if "file" in row else {"text": row.get("completion", "")}
    return {"text": prompt_text(row["prompt"]), "output": output}


def prompt_text(prompt: object) -> str:
    """A prompt as text: itself, or the last turn of a conversation."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    return str(last.get("content", "")) if isinstance(last, dict) else str(last)


# ---------------------------------------------------------------- text


def _with_name(text: str, repo_id: str, kind: Kind, folder: Path) -> str:
    """Replace the folder's name in the card's examples by the name on the Hub."""
    name = json.dumps(repo_id)
    if (folder / "codec").is_dir():  # the codec is read from a folder
        line = f"from huggingface_hub import snapshot_download\n\nname = snapshot_download({name})"
    else:
        line = f"name = {name}"
    text = NAME_LINE.sub(lambda _: line, text)
    if kind == "audio model":
        text = OWN_CLASS.sub(lambda found: f"{found.group(1)}{name})", text)
    if kind == "codec":
        text = OWN_CLASS.sub(lambda found: f"{found.group(1)}snapshot_download({name}))", text)
        own = "from trl_drcd.audio import SpectralCodec"
        text = text.replace(own, f"from huggingface_hub import snapshot_download\n{own}")
    return text


def _missing_use(text: str, kind: Kind, folder: Path, repo_id: str) -> list[str]:
    """A usage section, if the card has no example (as for a merge)."""
    if "```python" in text or kind in ("codec", "audio model"):
        return []
    name = json.dumps(repo_id)
    if kind == "adapter":
        lines = ["from trl_drcd.merging import load_adapter_model", f"model = load_adapter_model({name})"]
    elif read_json(folder / "config.json").get("model_type") in ("musicgen", "dia"):
        lines = ["from transformers import pipeline", f'player = pipeline("text-to-audio", model={name})']
        return ["## Use\n\n```python\n" + "\n".join([*lines, 'sound = player("a slow tune")', "```"])]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({name})",
        ]
    lines[:1] = [lines[0], "from transformers import AutoTokenizer", ""]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        'inputs = tokenizer("a slow tune", return_tensors="pt", return_token_type_ids=False)',
        'tokens = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]',
    ]
    if (folder / "codec").is_dir():
        lines.insert(1, "from huggingface_hub import snapshot_download\nfrom trl_drcd.audio import SpectralCodec")
        lines += [f'codec = SpectralCodec.from_pretrained(snapshot_download({name}) + "/codec")']
        lines += ["[(waveform, rate)] = codec.decode([tokens.tolist()])"]
    else:
        lines += ["print(tokenizer.decode(tokens, skip_special_tokens=True))"]
    return ["## Use\n\n```python\n" + "\n".join([*lines, "```"])]


def _samples_section(samples: Sequence[dict[str, object]], repo_id: str) -> list[str]:
    """A table of samples, with audio players."""
    if not samples:
        return []
    lines = ["## Samples", "", "| prompt | sample |", "|---|---|"]
    for row in samples:
        if "file" in row:
            url = f"https://huggingface.co/{repo_id}/resolve/main/samples/{quote(str(row['file']))}"
            shown = f'<audio controls src="{url}"></audio>'
        else:
            shown = markdown_cell(str(row.get("completion", "")))
        lines.append(f"| {markdown_cell(prompt_text(row.get('prompt', '')))} | {shown} |")
    return ["\n".join(lines)]


def _made_section(facts: CardFacts, record: dict[str, Any], bases: Sequence[str]) -> str:
    """
    How the model was made: command, weights of a merge, versions, paper.

    `bases` are the names on the Hub of a full model's bases: of a merge of checkpoints those of its parents.
    """
    lines, parents = ["## How it was made", ""], merged_from(record)
    command = facts.command
    if parents and not command:
        on_hub = len(bases) == len(parents) and "base_model" not in record
        named = list(bases) if on_hub else [name for name, _ in parents]
        words = ["--models", *named, "--weights", *(repr(weight) for _, weight in parents), "--out", _name(facts)]
        for option in ("dtype", "svd_rank", "base_model"):
            words += [f"--{option}", str(record[option])] if option in record else []
        command = f"trl-drcd merge {shlex.join(words)}"
    if len(parents) == 2:
        lines += [f"Interpolated at lambda = {parents[1][1]:g}: `(1 - lambda) * quality + lambda * diversity`.", ""]
    if command:
        lines += ["```bash", " ".join(command.split()), "```", ""]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines += [f"Pushed by [trl-drcd](https://pypi.org/project/trl-drcd/) {trl_drcd.__version__}, with {versions}.", ""]
    return "\n".join([*lines, f"Paper: [Diversity-Rewarded CFG Distillation]({PAPER})."])
