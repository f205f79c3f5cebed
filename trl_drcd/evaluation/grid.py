"""
The grid of an evaluation: every strategy sampled on the same prompts with the same seed, judged, and written down.

Results go to `results.jsonl`, one line for each row as it is done, which a second call does not do again; then to
`summary.csv`, plots and `report.html`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.evaluation.checks import check_ends, check_parts, check_settings
from trl_drcd.evaluation.information import forward_information, prompt_information
from trl_drcd.evaluation.judging import Judges, judge_samples
from trl_drcd.evaluation.metrics import bootstrap_interval, per_prompt, teacher_terms
from trl_drcd.evaluation.overview import write_report
from trl_drcd.evaluation.points import with_quality
from trl_drcd.evaluation.records import (
    append_line,
    content_digest,
    keep_samples,
    keep_tokens,
    kept_tokens,
    read_lines,
    settings_digest,
    write_lines,
)
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.evaluation.strategies import Models, Row, expand
from trl_drcd.files import local_name
from trl_drcd.merging.adapters import BASE
from trl_drcd.policies import policy_for
from trl_drcd.prompts import distinct, load_prompts
from trl_drcd.text.reward_models import question_of


@dataclass
class EvaluateArguments:
    """What `trl-drcd evaluate` takes; `--config FILE.yaml` gives the same from a file, `strategies` only there."""

    model: str = field(metadata={"help": "The base model, which with guidance is also the teacher."})
    dataset: str = field(metadata={"help": "Held-out prompts: JSONL, CSV or Parquet file, or hub name."})
    strategies: Any = field(
        default_factory=lambda: [{"name": "base"}], metadata={"help": "List of what is compared; in the YAML file."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of the strategies to do; all if none."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub data set."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    num_prompts: int = field(default=64, metadata={"help": "Held-out prompts."})
    samples_per_prompt: int = field(default=8, metadata={"help": "Samples of each, at least 2."})
    max_new_tokens: int = field(default=200, metadata={"help": "Largest length of a completion, in tokens or steps."})
    batch_size: int = field(default=64, metadata={"help": "Sequences at one time."})
    num_processes: int = field(default=1, metadata={"help": "Rows at one time, each in a process of its own."})
    dtype: str = field(default="float32", metadata={"help": "Of the models: float32, bfloat16 or float16."})
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher that the KL is taken to."})
    negative_prompt: str | None = field(default=None, metadata={"help": "x^- of the teacher."})
    omega: str = field(
        default="5",
        metadata={
            "help": "quality = omega * adherence + preference: a number, the paper's 5, or `equal`, which gives both "
            "parts the same range (largest minus smallest mean) over the rows."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the draws; the same for every strategy."})
    codec: str | None = field(default=None, metadata={"help": "Codec of a causal LM over audio tokens."})
    embedder: str | None = field(default=None, metadata={"help": "E, which was rewarded."})
    second_embedder: str | None = field(default=None, metadata={"help": "An embedding that was not rewarded."})
    judge: str | None = field(default=None, metadata={"help": "Text-audio judge, or sentence encoder for text."})
    reference: str | None = field(
        default=None, metadata={"help": "Held-out recordings under the judge, for the Fréchet distance (safetensors)."}
    )
    clap: str | None = field(default=None, metadata={"help": "A CLAP checkpoint as one more judge of adherence."})
    cross_encoder: str | None = field(
        default=None, metadata={"help": "Text: a cross-encoder as one more judge of adherence."}
    )
    reward_model: str | None = field(default=None, metadata={"help": "Text: a reward model, its reward a metric."})
    preference: str | None = field(default=None, metadata={"help": "Preference model."})
    prompt_information: bool = field(
        default=False, metadata={"help": "Measure what samples tell about their prompts under the frozen base."}
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "More metrics, each `module.function` with TRL's reward signature: higher is better."},
    )
    listen: int = field(default=4, metadata={"help": "Prompts on the page, one sample of each strategy."})

    def __post_init__(self) -> None:
        self.omega = str(self.omega)  # a number in a YAML file
        check_settings(self)

    def sampling_settings(self, row: Row, prompts: list[Any], digest: Callable[[str], str]) -> str:
        """
        Names what the samples of a row depend on: the contents of the models, not their names; those of weight 0 do
        not count, nor does the base, so that the ends of a sweep are the models that they are.
        """
        mixed = zip(row.models, row.weights, strict=True)
        models = [digest(self.model), *((digest(name), weight) for name, weight in mixed if weight and name != BASE)]
        guidance = [row.guidance_scale, row.negative_prompt] if row.guidance_scale != 1 else None
        drawn = [row.temperature, guidance]
        how = [self.samples_per_prompt, self.max_new_tokens, self.batch_size, self.dtype, self.seed]
        return settings_digest([models, drawn, how, prompts])

    def settings(self, row: Row, prompts: list[Any], digest: Callable[[str], str]) -> str:
        """Names what the numbers of a row depend on."""
        judges = (
            "codec", "embedder", "second_embedder", "judge", "reference", "clap", "cross_encoder", "reward_model",
            "preference",
        )  # fmt: skip
        heard = [digest(name) if (name := getattr(self, judge)) else None for judge in judges]
        judged = [self.guidance_scale, self.negative_prompt, self.prompt_information, self.metrics, self.listen]
        return settings_digest([self.sampling_settings(row, prompts, digest), heard, judged])


def evaluate(args: EvaluateArguments, extra_metrics: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """
    Sample and judge every row that is not in `results.jsonl` yet, then write summary, plots and report.

    Args:
        args ([`EvaluateArguments`]): Everything.
        extra_metrics (`dict`, *optional*): Name to a callable with TRL's reward signature, `(prompts, completions,
            **kwargs) -> list[float]`; for audio, `completions` are `(waveform, sampling_rate)` pairs.

    Returns:
        `list[dict]`: The lines of `results.jsonl`, in the order of the strategies; what an earlier call has left there
        and is not of this one is in `other_results.jsonl`.

    Raises:
        ValueError: If a strategy is not well-formed, or there are fewer prompts than asked for; before any sampling.
    """
    rows = expand(chosen(args.strategies, args.only))
    if args.omega == "equal" and args.preference and len({row.point for row in rows}) < 2:
        raise ValueError(f"`omega=equal` compares strategies, and `{rows[0].point}` is the only one; give a number")
    check_parts(args)
    prompts = distinct(load_prompts("dataset", args.dataset, args.dataset_split)["prompt"], args.num_prompts)
    if len(prompts) < args.num_prompts:
        raise ValueError(
            f"`dataset={args.dataset}` has {len(prompts)} different prompts, `num_prompts` is {args.num_prompts}"
        )
    file, others = Path(args.output_dir) / "results.jsonl", Path(args.output_dir) / "other_results.jsonl"
    digest = functools.cache(content_digest)
    settings = [args.settings(row, prompts, digest) for row in rows]
    lines = [*read_lines(others), *read_lines(file)]
    done = {line["settings"]: line for line in lines}
    waiting: dict[str, Row] = {}
    for setting, row in zip(settings, rows, strict=True):
        if setting not in done:
            waiting.setdefault(setting, row)
    for setting, result in measure_rows(waiting, prompts, args, extra_metrics or {}):
        done[setting] = result | {"settings": setting}
        append_line(file, done[setting])
    results = [done[setting] | about(row, args) for setting, row in zip(settings, rows, strict=True)]
    results = with_quality(results, args.omega)
    if kept := [line for line in lines if line["settings"] not in settings]:
        write_lines(others, kept)
    write_lines(file, results)
    write_report(results, prompts, args)
    return results


def chosen(strategies: Any, only: list[str]) -> Any:
    """
    The strategies whose names are in `only`; all if that is empty.

    Raises:
        ValueError: If a name is none of theirs.
    """
    if not only or not isinstance(strategies, list):
        return strategies
    names = [strategy.get("name") for strategy in strategies if isinstance(strategy, dict)]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"`only` has {unknown}; the strategies are {names}")
    return [strategy for strategy in strategies if isinstance(strategy, dict) and strategy.get("name") in only]


def measure_rows(
    waiting: dict[str, Row], prompts: list[Any], args: EvaluateArguments, extra_metrics: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of rows by their settings, as each is done."""
    if not waiting:
        return
    rows = list(waiting.values())
    names = {row: setting for setting, row in waiting.items()}
    if args.num_processes == 1:
        worker = Worker(args, prompts, extra_metrics, rows)
        for number, row in enumerate(rows, 1):
            print(f"[{number}/{len(rows)}] {row.name}", flush=True)
            yield names[row], worker(row)
        return
    # The slow ones first, so that no process is left alone with one of them; else in order, which loads least often
    rows = sorted(rows, key=lambda row: row.guidance_scale == 1)
    with ProcessPoolExecutor(args.num_processes, get_context("spawn")) as pool:
        try:
            futures = {pool.submit(_work, row, args, prompts, extra_metrics, rows): row for row in rows}
            with tqdm(total=len(rows), desc="evaluate", unit="row") as bar:
                for future in as_completed(futures):
                    yield names[futures[future]], future.result()
                    bar.set_postfix_str(futures[future].name)
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def _worker() -> list[Any]:
    return []


def _work(
    row: Row, args: EvaluateArguments, prompts: list[Any], extra_metrics: dict[str, Any], rows: list[Row]
) -> dict[str, Any]:
    """One row in a process that keeps models and judges for the next."""
    if not _worker():
        keep_freed_memory()
        _worker().append(Worker(args, prompts, extra_metrics, rows, quiet=True))
    result: dict[str, Any] = _worker()[0](row)
    return result


class Worker:
    """
    Measures rows, one at a time: samples them, judges the samples, keeps some.

    Args:
        args ([`EvaluateArguments`]): Everything.
        prompts (`list`): The held-out prompts.
        extra_metrics (`dict`): See [`evaluate`].
        rows (`list[Row]`): What it will be asked for; models of another shape are refused now.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
    """

    def __init__(
        self,
        args: EvaluateArguments,
        prompts: list[Any],
        extra_metrics: dict[str, Any],
        rows: list[Row],
        quiet: bool = False,
    ) -> None:
        self.args, self.prompts, self.quiet = args, prompts, quiet
        self.judges = Judges.load(args, extra_metrics)
        self.models = Models(args.model, getattr(torch, args.dtype))
        check_ends(self.models.base, rows)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        self.digest = functools.cache(content_digest)

    def _bar(self, name: str) -> str | None:
        return None if self.quiet else f"  {name:6s}"

    def samples(self, row: Row, model: Any) -> Samples:
        """Drawn now, or by an earlier call with the same settings."""
        args = self.args
        settings = args.sampling_settings(row, self.prompts, self.digest)
        file = Path(args.output_dir) / "samples" / f"{row.slug}_{settings}.safetensors"
        samples = kept_tokens(file, self.prompts, args.samples_per_prompt, settings)
        if samples is None:
            samples = sample_prompts(
                model, self.tokenizer, self.prompts, args.samples_per_prompt, row.guidance_scale, row.negative_prompt,
                row.temperature, args.max_new_tokens, args.batch_size, args.seed, description=self._bar("sample"),
            )  # fmt: skip
            keep_tokens(file, samples, settings)
        return samples

    @torch.no_grad()
    def __call__(self, row: Row) -> dict[str, Any]:
        """The line of `results.jsonl`, without its settings and its quality."""
        args, model = self.args, self.models(row)
        samples = self.samples(row, model)
        terms = teacher_terms(
            model, self.models.base, self.tokenizer, samples, args.guidance_scale, args.negative_prompt,
            row.temperature, row.guidance_scale, args.batch_size, description=self._bar("KL"),
        )  # fmt: skip
        items = completions(samples, self.models.base, self.tokenizer, args)
        values, metrics = judge_samples(samples, items, self.judges, args.seed)
        values["kl"] = per_prompt(terms.kl, args.samples_per_prompt)
        values["entropy_per_token"] = per_prompt(terms.entropy / terms.tokens, args.samples_per_prompt)
        if args.prompt_information:
            values["prompt_information"] = per_prompt(self.information(samples, items), args.samples_per_prompt)
        metrics |= {name: bootstrap_interval(value) for name, value in values.items()}
        speed = samples.tokens_per_second
        metrics["tokens_per_second"] = {"mean": speed, "low": speed, "high": speed}
        step = max(1, len(self.prompts) // max(1, args.listen))
        shown = [items[i * args.samples_per_prompt] for i in range(0, len(self.prompts), step)[: args.listen]]
        folder = f"{row.slug}_{args.settings(row, self.prompts, self.digest)}"
        keep_samples(Path(args.output_dir) / "samples" / folder, shown)
        rounded = {name: [float(f"{v:.6g}") for v in value] for name, value in values.items()}
        kind = "text" if isinstance(items[0], str) else "music"
        return about(row, args) | {"kind": kind, "metrics": metrics, "per_prompt": rounded, "samples": folder}

    def information(self, samples: Samples, items: list[Any]) -> torch.Tensor:
        """Of each completion on its prompt, nats, under the base."""
        base, bar = self.models.base, self._bar("inform")
        if isinstance(items[0], str):
            requests = [question_of(prompt) for prompt in samples.repeated_prompts]
            return prompt_information(base, self.tokenizer, requests, items, description=bar)
        return forward_information(base, self.tokenizer, samples, self.args.batch_size, bar)


def about(row: Row, args: EvaluateArguments) -> dict[str, Any]:
    """What a line says besides its numbers."""
    return {
        "strategy": row.strategy, "point": row.point, "name": row.name,
        "model": " + ".join(map(local_name, row.models or (args.model,))), "weights": list(row.weights),
        "guidance_scale": row.guidance_scale, "temperature": row.temperature, "diversity_coef": row.diversity_coef,
        "interpolation_weight": row.interpolation_weight, "training_seed": row.training_seed, "seed": args.seed,
        "prompts": args.num_prompts, "samples_per_prompt": args.samples_per_prompt,
        "teacher_guidance_scale": args.guidance_scale, "passes_per_token": 1 if row.guidance_scale == 1 else 2,
    }  # fmt: skip


def completions(samples: Samples, model: Any, tokenizer: Any, args: EvaluateArguments) -> list[Any]:
    """Audio, `(waveform, sampling_rate)`, by the codec or the model's own; else texts."""
    codec: Any = SpectralCodec.from_pretrained(args.codec) if args.codec else policy_for(model, tokenizer).codec(model)
    if codec is not None:
        return list(codec.decode(samples.token_ids))
    texts: list[Any] = tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True)
    return texts
