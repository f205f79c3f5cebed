"""What a training script needs around the trainer: prompts of a file, a log file, a deadline, a model card."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerCallback

from ._files import write_text
from ._inputs.prompts import check_feature, empty_rows, read_file, read_from_hub

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(argument: str, name: str, split: str, streaming: bool = False) -> Any:
    """
    Prompts of a local file or of the hub, in the columns `prompt` and, where it is there, `negative_prompt`.

    Args:
        argument (`str`): What the user calls it, for the messages.
        name (`str`): A JSONL, CSV or Parquet file, or the name of a data set on the hub.
        split (`str`): Split of the data set on the hub.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed, without a look at all.

    Returns:
        `Dataset`: Not empty, no prompt empty; an `IterableDataset` where `streaming`.

    Raises:
        FileNotFoundError: If the name is that of a file, and there is none.
        ValueError: If the format is not known, there is no row, no column `prompt`, or a row without a prompt.
    """
    suffix = Path(name).suffix
    if suffix in FORMATS or Path(name).exists():
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"`{argument}={name}` is no file; give a JSONL, CSV or Parquet file, or a hub name"
            )
        if suffix not in FORMATS:
            raise ValueError(f"`{argument}={name}` has an unknown format; expected one of {sorted(FORMATS)}")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"`{argument}={name}` is empty; it must have at least one row with a `prompt`")
        dataset = read_file(f"`{argument}={name}`", name, FORMATS[suffix], streaming)
    else:
        dataset = read_from_hub(f"`{argument}={name}`", name, split, streaming)
    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know them before its first row
    if "prompt" not in columns:
        raise ValueError(f"`{argument}={name}` must have a column `prompt`, got columns {columns}")
    dataset = dataset.select_columns([c for c in ("prompt", "negative_prompt") if c in columns])
    for column, feature in (dataset.features or {}).items():
        check_feature(feature, f"column `{column}` of `{argument}={name}`")
    if streaming:
        return dataset
    if empty := empty_rows(dataset["prompt"]):
        raise ValueError(
            f"`{argument}={name}` has no prompt in rows {empty[:8]} ({len(empty)} in all); give each a prompt"
        )
    return dataset


def distinct(prompts: Iterable[Any], count: int) -> list[Any]:
    """The first `count` different prompts, texts or conversations."""
    return [json.loads(prompt) for prompt in list(dict.fromkeys(map(json.dumps, prompts)))[:count]]


class LogFile(TrainerCallback):
    """Keeps `log.jsonl` in the output folder up to date: one JSON object per entry of the log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # what a resumed run knows of; lines after its checkpoint come again
            write_text(self._file(args), "".join(map(self._line, state.log_history)))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self._file(args).open("a") as file:
                file.write(self._line(state.log_history[-1]))

    def _file(self, args: Any) -> Path:
        return Path(args.output_dir) / "log.jsonl"

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps(entry, default=float) + "\n"


class Deadline(TrainerCallback):
    """Ends training after so many minutes, with the step that is under way."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.end:
            control.should_training_stop = True


def final_metrics(log_history: list[dict[str, Any]], held_out: bool) -> dict[str, dict[str, float]]:
    """
    Metrics before and after, for the model card: of the held-out prompts, or of the first and the last logged steps.

    Args:
        log_history (`list[dict]`): The trainer's log.
        held_out (`bool`): Whether the run evaluated.

    Returns:
        `dict`: `"first (step 0)"` and `"last (step 60)"` to `kl`, `kl_per_token` and `entropy` in nats, `diversity`.
    """
    prefix = "eval_" if held_out else ""
    entries = [entry for entry in log_history if f"{prefix}kl" in entry]
    chosen = {"first": entries[0], "last": entries[-1]} if entries else {}
    return {
        f"{which} (step {entry['step']})": {
            name: entry[prefix + name]
            for name in ("kl", "kl_per_token", "entropy", "diversity")
            if prefix + name in entry
        }
        for which, entry in chosen.items()
    }


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of named rows, numbers with 4 digits, texts as they are; the columns are the first row's."""
    columns = list(next(iter(rows.values()), {}))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(_cell(text) for text in (name, *texts)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in one cell of a Markdown table, which would take a part of it for markup."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def local_name(path: str) -> str:
    """The last part of a local path; a hub name as it is."""
    return Path(path).resolve().name if Path(path).exists() else path


def model_card(
    name: str,
    base_model: str,
    settings: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    audio: bool,
    adapter: bool,
) -> ModelCard:
    """
    The README.md of a distilled model.

    Args:
        name (`str`): Title.
        base_model (`str`): Hub name or local path.
        settings (`dict`): Of the run; `guidance_scale` and `temperature` among them.
        metrics (`dict`): See [`final_metrics`].
        audio (`bool`): Whether the completions are music.
        adapter (`bool`): Whether the folder holds a PEFT adapter.

    Returns:
        `ModelCard`: YAML header and text.
    """
    data = ModelCardData(
        base_model=local_name(base_model),
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-to-audio" if audio else "text-generation",
        tags=["trl", "trl-drcd", "cfg-distillation", *(["music"] if audio else [])],
    )
    about = (
        "Fine-tuned by [diversity-rewarded CFG distillation](https://huggingface.co/papers/2410.06084): guidance "
        f"{settings['guidance_scale']:g} is in the weights. Sample with guidance off (`guidance_scale=1`), at "
        f"temperature {settings['temperature']:g} and without truncation, as `generation_config.json` says."
    )
    if audio:
        about += " Samples are in `samples/`; the codec is a part of the model, or in `codec/`."
    units = (
        "KL to the guided teacher in nats per sequence and per token, entropy in nats per token; diversity is the mean"
        " cosine distance of the samples of a prompt under the embedding model."
    )
    settings_table = markdown_table({key: {"value": value} for key, value in settings.items()})
    sections = [f"# {name}", about, "## Settings", settings_table, "## Metrics", units, markdown_table(metrics)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
