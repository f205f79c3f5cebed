"""
Rows measured: sampled, decoded, judged, some completions kept; in this process or in several.

Each process loads base, tokenizer, codec and judges once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.diversity import one_channel
from trl_drcd.evaluation.allowed import allowed_in_rows
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.checks import check_ends
from trl_drcd.evaluation.information import forward_information, prompt_information
from trl_drcd.evaluation.judging import Judges, RewardFunction
from trl_drcd.evaluation.likelihood import SequenceTerms, teacher_terms
from trl_drcd.evaluation.listening import keep_completions, keep_tokens, kept_tokens
from trl_drcd.evaluation.metrics import Drawn, measure
from trl_drcd.evaluation.models import Models
from trl_drcd.evaluation.plan import HeldOut, Task
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.sampling import Completion, Samples, sample_prompts
from trl_drcd.evaluation.strategies import Row
from trl_drcd.merging.adapters import BASE
from trl_drcd.policies import policy_for
from trl_drcd.text.reward_models import question_of


class Worker:
    """
    Measures rows, one at a time.

    Args:
        args ([`EvaluateArguments`]): Everything.
        held_out ([`HeldOut`]): The prompts.
        rows (`list[Row]`): What it will be asked for; models of another shape are refused now.
        extra_metrics (`dict`, *optional*): Name of a metric to a callable with TRL's reward signature.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
    """

    def __init__(
        self,
        args: EvaluateArguments,
        held_out: HeldOut,
        rows: Sequence[Row],
        extra_metrics: Mapping[str, RewardFunction] | None = None,
        quiet: bool = False,
    ) -> None:
        self.args, self.held_out, self.quiet = args, held_out, quiet
        self.judges = Judges.load(args, extra_metrics or {})
        self.models = Models(args.model, getattr(torch, args.dtype))
        check_ends(self.models.base, rows)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        names = [args.model, *(name for row in rows for name in row.models if name != BASE)]
        self.allowed = allowed_in_rows(args.allowed_token_ids, names, self.models.base, self.tokenizer)
        own = policy_for(self.models.base, self.tokenizer).codec(self.models.base)
        self.codec: Any = SpectralCodec.from_pretrained(args.codec) if args.codec else own

    def __call__(self, task: Task) -> Result:
        """The task's line of `results.jsonl`, but for its quality; some of its samples are kept."""
        args, row, model = self.args, task.row, self.models(task.row)
        samples = self.samples(task, model)
        completions = self.decode(samples)
        drawn = Drawn(
            samples, one_channel(completions), self.judges, args.seed, partial(self.score, row, model, samples)
        )
        if args.prompt_information:
            drawn.inform = partial(self.inform, samples, completions)
        metrics, by_prompt = measure(drawn)
        folder = Path(args.output_dir) / "samples" / task.folder
        keep_completions(folder, samples, completions, args.listen, args.listen_samples)
        kind: Literal["text", "music"] = "music" if self.codec is not None else "text"
        rounded = {key: [float(f"{value:.6g}") for value in values] for key, values in by_prompt.items()}
        return replace(task.about(args), kind=kind, metrics=metrics, per_prompt=rounded, samples=task.folder)

    def samples(self, task: Task, model: Any) -> Samples:
        """Drawn now, or by an earlier call with the same settings."""
        args, row, held_out = self.args, task.row, self.held_out
        file = Path(args.output_dir) / "samples" / task.tokens_file
        samples = kept_tokens(file, held_out, args.samples_per_prompt, args.chat_template_kwargs)
        if samples is not None:
            samples.allowed_token_ids = self.allowed
        else:
            try:
                samples = sample_prompts(
                    model, self.tokenizer, held_out.prompts, args.samples_per_prompt, row.guidance_scale,
                    row.negative_prompt, row.temperature, args.max_new_tokens, args.batch_size, args.seed,
                    self._bar("sample"), held_out.negative_prompts, args.chat_template_kwargs,
                    held_out.teacher_prompts, self.allowed,
                )  # fmt: skip
            except RuntimeError as error:
                raise RuntimeError(f"`{row.name}` cannot be sampled: {error}") from error
            keep_tokens(file, samples)
        return samples

    def decode(self, samples: Samples) -> list[Completion]:
        """The samples as sounds, by the codec or the model's own; else as texts."""
        if self.codec is not None:
            return list(self.codec.decode(samples.token_ids))
        return list(self.tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True))

    def score(self, row: Row, model: Any, samples: Samples) -> SequenceTerms:
        """
        KL to the guided teacher and entropy of each sample.

        Raises:
            ValueError: If one is NaN.
        """
        args = self.args
        terms = teacher_terms(
            model, self.models.base, self.tokenizer, samples, args.guidance_scale, args.negative_prompt,
            row.temperature, row.guidance_scale, args.batch_size, self._bar("KL"), row.negative_prompt,
        )  # fmt: skip
        if terms.kl.isnan().any() or terms.entropy.isnan().any():
            remedy = "its model or the base is broken" if args.dtype == "float32" else "try float32"
            raise ValueError(
                f"`{row.name}` gives log-probabilities that are NaN with `dtype={args.dtype}`, so that its samples "
                f"mean nothing; {remedy}"
            )
        return terms

    def inform(self, samples: Samples, completions: list[Completion]) -> torch.Tensor:
        """What each sample tells about its prompt under the base, nats."""
        base, bar = self.models.base, self._bar("inform")
        if self.codec is None:
            requests = [question_of(prompt) for prompt in samples.repeated_prompts]
            texts = [str(completion) for completion in completions]
            return prompt_information(base, self.tokenizer, requests, texts, description=bar)
        return forward_information(base, self.tokenizer, samples, self.args.batch_size, bar)

    def _bar(self, name: str) -> str | None:
        return None if self.quiet else f"  {name:6s}"


# ---------------------------------------------------------------- processes


def measure_tasks(
    tasks: Sequence[Task],
    held_out: HeldOut,
    args: EvaluateArguments,
    extra_metrics: Mapping[str, RewardFunction],
) -> Iterator[Result]:
    """The lines of tasks, as each is done."""
    if not tasks:
        return
    rows = [task.row for task in tasks]
    make = partial(Worker, args, held_out, rows, extra_metrics)
    if args.num_processes == 1:
        worker = make()
        for number, task in enumerate(tasks, 1):
            print(f"[{number}/{len(tasks)}] {task.row.name}", flush=True)
            yield worker(task)
        return
    # The slow ones first, so that no process is left alone with one of them; else in order, which loads least often
    ordered = sorted(tasks, key=lambda task: task.row.guidance_scale == 1)
    others = set(active_children())
    pool = ProcessPoolExecutor(args.num_processes, get_context("spawn"), initializer=_end_with_parent)
    try:
        futures = {pool.submit(_measure, task, partial(make, quiet=True)): task for task in ordered}
        with tqdm(total=len(tasks), desc="evaluate", unit="row") as bar:
            for future in as_completed(futures):
                yield future.result()
                bar.set_postfix_str(futures[future].row.name)
                bar.update()
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()  # or it would first finish the row that nobody waits for
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_WORKER: list[Worker] = []
"""The one of this process, once it has measured a row."""


def _measure(task: Task, make: partial[Worker]) -> Result:
    """One row in a process that keeps models and judges for the next."""
    if not _WORKER:
        keep_freed_memory()
        _WORKER.append(make())
    return _WORKER[0](task)


def _end_with_parent() -> None:
    """Ends this process when the one that started it ends, also by a signal that cannot be handled."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
