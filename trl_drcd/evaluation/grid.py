"""
The grid of an evaluation: every strategy sampled on the same prompts with the same seed, judged, and written down.

Results go to `results.jsonl`, one line for each row as it is done, which a second call does not do again; then to
`summary.csv`, plots and `report.html`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from trl_drcd._files import wav_bytes, write_bytes, write_text
from trl_drcd._run import distinct, load_prompts, local_name
from trl_drcd.codecs import SpectralCodec
from trl_drcd.policies import policy_for

from . import plots
from .checks import check_ends, check_parts, check_settings
from .judging import Judges, judge_samples
from .metrics import bootstrap_interval, per_prompt, teacher_terms
from .report import comparison_page
from .sampling import Samples, sample_prompts
from .strategies import Models, Row, expand
from .tables import formatted

# Columns of the table and of the summary, where they were measured
TABLE = {
    "quality": "quality",
    "adherence": "text adherence",
    "preference": "preference (nats)",
    "diversity": "diversity",
    "diversity_second": "diversity (second)",
    "entropy_per_token": "entropy (nats/token)",
    "kl": "KL to guided teacher (nats)",
    "frechet": "Fréchet distance",
}


@dataclass
class EvaluateArguments:
    """What `trl-drcd evaluate` takes; `--config FILE.yaml` gives the same from a file, `strategies` only there."""

    model: str = field(metadata={"help": "The base model, which with guidance is also the teacher."})
    dataset: str = field(metadata={"help": "Held-out prompts: JSONL, CSV or Parquet file, or hub name."})
    strategies: Any = field(
        default_factory=lambda: [{"name": "base"}], metadata={"help": "List of what is compared; in the YAML file."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub data set."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    num_prompts: int = field(default=64, metadata={"help": "Held-out prompts."})
    samples_per_prompt: int = field(default=8, metadata={"help": "Samples of each, at least 2."})
    max_new_tokens: int = field(default=200, metadata={"help": "Largest length of a completion, in tokens or steps."})
    batch_size: int = field(default=64, metadata={"help": "Sequences at one time."})
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher that the KL is taken to."})
    negative_prompt: str | None = field(default=None, metadata={"help": "x^- of the teacher."})
    omega: float = field(default=5.0, metadata={"help": "quality = omega * adherence + preference; the paper's 5."})
    seed: int = field(default=0, metadata={"help": "Of the draws; the same for every strategy."})
    codec: str | None = field(default=None, metadata={"help": "Codec of a causal LM over audio tokens."})
    embedder: str | None = field(default=None, metadata={"help": "E, which was rewarded."})
    second_embedder: str | None = field(default=None, metadata={"help": "An embedding that was not rewarded."})
    judge: str | None = field(default=None, metadata={"help": "Text-audio judge, or sentence encoder for text."})
    clap: str | None = field(default=None, metadata={"help": "A CLAP checkpoint as one more judge of adherence."})
    cross_encoder: str | None = field(
        default=None, metadata={"help": "Text: a cross-encoder as one more judge of adherence."}
    )
    reward_model: str | None = field(default=None, metadata={"help": "Text: a reward model, its reward a metric."})
    preference: str | None = field(default=None, metadata={"help": "Preference model."})
    listen: int = field(default=4, metadata={"help": "Prompts on the page, one sample of each strategy."})

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def fingerprint(self) -> str:
        """Names what a row's numbers depend on besides the row."""
        ignored = {"strategies", "output_dir", "listen"}
        parts = {name: value for name, value in asdict(self).items() if name not in ignored}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


Progress = Callable[[str], None]


def evaluate(args: EvaluateArguments, extra_metrics: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """
    Sample and judge every row that is not in `results.jsonl` yet, then write summary, plots and report.

    Args:
        args ([`EvaluateArguments`]): Everything.
        extra_metrics (`dict`, *optional*): Name to a callable with TRL's reward signature, `(prompts, completions,
            **kwargs) -> list[float]`; for audio, `completions` are `(waveform, sampling_rate)` pairs.

    Returns:
        `list[dict]`: The lines of `results.jsonl`, in the order of the strategies.

    Raises:
        ValueError: If a strategy is not well-formed, or there are fewer prompts than asked for; before any sampling.
    """
    rows = expand(args.strategies)
    check_parts(args)
    prompts = distinct(load_prompts("dataset", args.dataset, args.dataset_split)["prompt"], args.num_prompts)
    if len(prompts) < args.num_prompts:
        raise ValueError(
            f"`dataset={args.dataset}` has {len(prompts)} different prompts, `num_prompts` is {args.num_prompts}"
        )
    file = Path(args.output_dir) / "results.jsonl"
    done = read_results(file, args.fingerprint)
    if waiting := [row for row in rows if row.slug not in done]:
        models, judges = Models(args.model), Judges.load(args, extra_metrics or {})
        check_ends(models.base, waiting)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        for number, row in enumerate(waiting, 1):
            print(f"[{number}/{len(waiting)}] {row.name}", flush=True)
            result = measure(row, models, tokenizer, prompts, judges, args)
            append_line(file, result)
            done[row.slug] = result
    results = [done[row.slug] for row in rows]
    write_report(results, args)
    return results


@torch.no_grad()
def measure(
    row: Row, models: Models, tokenizer: Any, prompts: list[Any], judges: Judges, args: EvaluateArguments
) -> dict[str, Any]:
    """One row: samples it, judges the samples, keeps some; the line of `results.jsonl`."""
    model = models(row)
    samples = sample_prompts(
        model, tokenizer, prompts, args.samples_per_prompt, row.guidance_scale, row.negative_prompt, row.temperature,
        args.max_new_tokens, args.batch_size, args.seed, description="  sample",
    )  # fmt: skip
    terms = teacher_terms(
        model, models.base, tokenizer, samples, args.guidance_scale, args.negative_prompt, row.temperature,
        row.guidance_scale, args.batch_size, description="  KL    ",
    )  # fmt: skip
    items = completions(samples, models.base, tokenizer, args)
    values, metrics = judge_samples(samples, items, judges, args.omega, args.seed)
    values["kl"] = per_prompt(terms.kl, args.samples_per_prompt)
    values["entropy_per_token"] = per_prompt(terms.entropy / terms.tokens, args.samples_per_prompt)
    metrics |= {name: bootstrap_interval(value) for name, value in values.items()}
    speed = samples.tokens_per_second
    metrics["tokens_per_second"] = {"mean": speed, "low": speed, "high": speed}
    step = max(1, len(prompts) // max(1, args.listen))
    shown = [items[i * args.samples_per_prompt] for i in range(0, len(prompts), step)[: args.listen]]
    keep_samples(Path(args.output_dir) / "samples" / row.slug, shown)
    about = {
        "strategy": row.strategy, "name": row.name, "model": " + ".join(map(local_name, row.models or (args.model,))),
        "weights": list(row.weights), "guidance_scale": row.guidance_scale, "temperature": row.temperature,
        "diversity_coef": row.diversity_coef, "interpolation_weight": row.interpolation_weight, "seed": args.seed,
        "prompts": args.num_prompts, "samples_per_prompt": args.samples_per_prompt,
    }  # fmt: skip
    rounded = {name: [float(f"{v:.6g}") for v in value] for name, value in values.items()}
    return about | {"metrics": metrics, "per_prompt": rounded, "row": row.slug, "settings": args.fingerprint}


def completions(samples: Samples, model: Any, tokenizer: Any, args: EvaluateArguments) -> list[Any]:
    """Audio, `(waveform, sampling_rate)`, by the codec or the model's own; else texts."""
    codec: Any = SpectralCodec.from_pretrained(args.codec) if args.codec else policy_for(model, tokenizer).codec(model)
    if codec is not None:
        return list(codec.decode(samples.token_ids))
    texts: list[Any] = tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True)
    return texts


def keep_samples(folder: Path, items: list[Any]) -> None:
    """Writes completions as `00.wav`, ... or `00.txt`, ..."""
    for number, item in enumerate(items):
        if isinstance(item, str):
            write_text(folder / f"{number:02d}.txt", item)
        else:
            write_bytes(folder / f"{number:02d}.wav", wav_bytes(*item))


def read_samples(folder: Path) -> list[Any]:
    """What [`keep_samples`] wrote."""
    from trl_drcd._extras import require

    items: list[Any] = []
    for path in sorted(folder.glob("[0-9]*")):
        if path.suffix == ".txt":
            items.append(path.read_text())
        else:
            waveform, rate = require("soundfile", "audio").read(path, dtype="float32")
            items.append((torch.from_numpy(waveform), rate))
    return items


# ---------------------------------------------------------------- files


def append_line(file: Path, result: dict[str, Any]) -> None:
    """One line more, on the disk before this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_results(file: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """The lines that were measured with these settings, by row; a torn last line is left out."""
    if not file.exists():
        return {}
    text = file.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(file, text)
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["row"]: line for line in lines if line["settings"] == fingerprint}


def write_report(results: list[dict[str, Any]], args: EvaluateArguments) -> None:
    """`summary.csv`, plots and `report.html` of the rows."""
    output = Path(args.output_dir)
    columns = {name: head for name, head in TABLE.items() if all(name in row["metrics"] for row in results)}
    first = results[0]["metrics"]["tokens_per_second"]["mean"]
    header = ["", *columns.values(), "tokens/s", "cost"]
    table = []
    for row in results:
        speed = row["metrics"]["tokens_per_second"]["mean"]
        cells = [formatted(row["metrics"][name]) for name in columns]
        table.append([row["name"], *cells, f"{speed:.0f}", f"{first / speed:.2f}"])
    write_text(output / "summary.csv", summary(results))
    figures = []
    if "quality" in columns and "diversity" in columns:
        figures.append(plots.save(plots.front_plot(results), output / "front"))
        if "preference" in columns:
            figures.append(plots.save(plots.front_plot(results, y="adherence"), output / "front_adherence"))
        if (curves := plots.lambda_plot(results)) is not None:
            figures.append(plots.save(curves, output / "lambda"))
    prompts = distinct(load_prompts("dataset", args.dataset, args.dataset_split)["prompt"], args.num_prompts)
    step = max(1, len(prompts) // max(1, args.listen))
    shown = [prompts[i] for i in range(0, len(prompts), step)[: args.listen]]
    about = (
        f"{args.num_prompts} held-out prompts x {args.samples_per_prompt} samples, seed {args.seed}; mean and 95 % "
        f"bootstrap interval over prompts. {quality_is(results, args.omega)} Cost: time per token, the first row's "
        "being 1."
    )
    page = comparison_page(
        "Quality and diversity",
        about,
        (header, table),
        [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in shown],
        {row["name"]: read_samples(output / "samples" / row["row"]) for row in results},
        figures,
    )
    write_text(output / "report.html", page)


def quality_is(results: list[dict[str, Any]], omega: float) -> str:
    """What `quality` stands for, in words."""
    if "quality" not in results[0]["metrics"]:
        return ""
    if "preference" in results[0]["metrics"]:
        return f"Quality: {omega:g} x text adherence + preference."
    return "Quality: text adherence."


def summary(results: list[dict[str, Any]]) -> str:
    """All rows as CSV: what they are, and mean, low and high of every metric."""
    metrics = list(dict.fromkeys(name for row in results for name in row["metrics"]))
    about = ["name", "strategy", "model", "guidance_scale", "temperature", "interpolation_weight", "diversity_coef"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*about, *(f"{name}{part}" for name in metrics for part in ("", "_low", "_high"))])
    for row in results:
        cells = [row["metrics"].get(name, {}).get(part, "") for name in metrics for part in ("mean", "low", "high")]
        writer.writerow([*(row[name] for name in about), *cells])
    return file.getvalue()


def per_prompt_of(results: list[dict[str, Any]], *metrics: str) -> np.ndarray:
    """Metrics of rows on each prompt, shape `(rows, P, len(metrics))`: what the tests on fronts take."""
    return np.array([np.stack([row["per_prompt"][metric] for metric in metrics], -1) for row in results])
