"""
Measure rows: sample, decode, score, keep some completions; in this process or in several.

Each process loads the base model, tokenizer, codec and judges once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.compat.products import fast_products
from trl_drcd.compat.threads import use_own_cores
from trl_drcd.diversity import one_channel
from trl_drcd.evaluation.allowed import allowed_in_rows, suppressed_in
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.checks import check_ends
from trl_drcd.evaluation.information import forward_information, prompt_information
from trl_drcd.evaluation.judging import Judges, RewardFunction
from trl_drcd.evaluation.likelihood import SequenceTerms, teacher_terms
from trl_drcd.evaluation.listening import keep_completions, keep_tokens, kept_tokens
from trl_drcd.evaluation.metrics import Drawn, measure
from trl_drcd.evaluation.models import Models
from trl_drcd.evaluation.plan import HeldOut, Task
from trl_drcd.evaluation.results import Result, rounded
from trl_drcd.evaluation.sampling import Completion, Samples, sample_prompts, tokenize_prompts
from trl_drcd.evaluation.strategies import Row
from trl_drcd.policies import policy_for
from trl_drcd.text.reward_models import question_of
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.sampler import check_sampler


class Worker:
    """
    Measures rows, one at a time.

    Args:
        args ([`EvaluateArguments`]): Settings of the evaluation.
        held_out ([`HeldOut`]): The prompts.
        rows (`list[Row]`): All rows of the evaluation; the shapes of their models are checked at once.
        extra_metrics (`dict`, *optional*): Name of a metric to a callable with TRL's reward signature.
        quiet (`bool`, *optional*, defaults to `False`): Show no progress bars.

    Raises:
        ValueError: If the shape of a model's weight is not the base's, a weight of the base is not finite, or its
            family is sampled from another distribution than its own.
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
        check_ends(self.models.base, rows, self.args.model)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        self.allowed = allowed_in_rows(args.allowed_token_ids, suppressed_in(args), self.models.base, self.tokenizer)
        policy = policy_for(self.models.base, self.tokenizer, args.chat_template_kwargs, self.allowed)
        with prefix_errors("model"):
            prompts = tokenize_prompts(policy, held_out.prompts)
            check_sampler(policy, self.models.base, prompts, args.max_new_tokens)
        own = policy.codec(self.models.base)
        self.codec: Any = SpectralCodec.from_pretrained(args.codec) if args.codec else own

    def __call__(self, task: Task) -> Result:
        """Measure a task and keep some of its samples; `quality` is added later."""
        with fast_products():
            return self._measured(task)

    def _measured(self, task: Task) -> Result:
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
        per_prompt = {key: rounded(values) for key, values in by_prompt.items()}
        return replace(task.about(args), kind=kind, metrics=metrics, per_prompt=per_prompt, samples=task.folder)

    def samples(self, task: Task, model: Any) -> Samples:
        """Sample the task, or reuse the samples of an earlier call with the same settings."""
        args, row, held_out = self.args, task.row, self.held_out
        file = Path(args.output_dir) / "samples" / task.tokens_file
        samples = kept_tokens(file, held_out, args.samples_per_prompt, args.chat_template_kwargs)
        if samples is not None:
            samples.allowed_token_ids = self.allowed
        else:
            try:
                samples = sample_row(row, model, self.tokenizer, args, held_out, self.allowed, self._bar("sample"))
            except RuntimeError as error:
                raise RuntimeError(f"`{row.name}` cannot be sampled: {error}") from error
            keep_tokens(file, samples)
        return samples

    def decode(self, samples: Samples) -> list[Completion]:
        """Decode the samples to audio, by the given codec or the model's own; without one, to text."""
        if self.codec is not None:
            return list(self.codec.decode(samples.token_ids))
        return list(self.tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True))

    def score(self, row: Row, model: Any, samples: Samples) -> SequenceTerms:
        """
        KL to the guided teacher and entropy of each prompt's first `likelihood_samples` samples.

        Raises:
            ValueError: If a value is NaN.
        """
        args, scored = self.args, samples.first(self.args.scored_samples)
        terms = teacher_terms(
            model, self.models.base, self.tokenizer, scored, args.guidance_scale, args.negative_prompt,
            row.temperature, row.guidance_scale, args.batch_size, self._bar("KL"), row.negative_prompt,
            row.early,
        )  # fmt: skip
        if terms.kl.isnan().any() or terms.entropy.isnan().any():
            remedy = "the weights of its model or of the base are broken" if args.dtype == "float32" else "try float32"
            raise ValueError(
                f"`{row.name}` gives log-probabilities that are NaN with `dtype={args.dtype}`, so its samples are "
                f"meaningless; {remedy}"
            )
        return terms

    def inform(self, samples: Samples, completions: list[Completion]) -> torch.Tensor:
        """Pointwise mutual information of each sample and its prompt under the base, nats, `(B,)`."""
        base, bar = self.models.base, self._bar("inform")
        if self.codec is None:
            requests = [question_of(prompt) for prompt in samples.repeated_prompts]
            texts = [str(completion) for completion in completions]
            return prompt_information(base, self.tokenizer, requests, texts, description=bar)
        return forward_information(base, self.tokenizer, samples, self.args.batch_size, bar)

    def _bar(self, name: str) -> str | None:
        return None if self.quiet else f"  {name:6s}"


def sample_row(
    row: Row,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: EvaluateArguments,
    held_out: HeldOut,
    allowed: torch.Tensor | None,
    description: str | None = None,
) -> Samples:
    """Sample a row; the arguments are those of [`~trl_drcd.evaluation.sampling.sample_prompts`]."""
    return sample_prompts(
        model, tokenizer, held_out.prompts, args.samples_per_prompt, row.guidance_scale, row.negative_prompt,
        row.temperature, args.max_new_tokens, args.batch_size, args.seed, description, held_out.negative_prompts,
        args.chat_template_kwargs, held_out.teacher_prompts, allowed, row.early,
    )  # fmt: skip


# ---------------------------------------------------------------- processes


def measure_tasks(
    tasks: Sequence[Task],
    held_out: HeldOut,
    args: EvaluateArguments,
    extra_metrics: Mapping[str, RewardFunction],
) -> Iterator[Result]:
    """Measure tasks, in `args.num_processes` processes, and yield each result when it is done."""
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
    # Slow rows first, so that none of them runs alone at the end; otherwise in order, which minimises model loading
    ordered = sorted(tasks, key=lambda task: task.row.guidance_scale == 1)
    others = set(active_children())
    pool = ProcessPoolExecutor(args.num_processes, get_context("spawn"), _start, (args.num_processes,))
    try:
        with _no_interrupts():  # submitting starts the processes, which inherit this
            futures = {pool.submit(_measure, task, partial(make, quiet=True)): task for task in ordered}
        with tqdm(total=len(tasks), desc="evaluate", unit="row") as bar:
            for future in as_completed(futures):
                yield future.result()
                bar.set_postfix_str(futures[future].row.name)
                bar.update()
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()  # otherwise it would first finish its row
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_WORKER: list[Worker] = []
"""The worker of this process, once created."""


def _start(processes: int) -> None:
    """Set up a new process, one of several."""
    _end_with_parent()
    keep_freed_memory()
    use_own_cores(processes)


def _measure(task: Task, make: partial[Worker]) -> Result:
    """Measure a row; models and judges stay loaded for the next."""
    if not _WORKER:
        _WORKER.append(make())
    return _WORKER[0](task)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, which in a terminal reaches child processes too: the parent handles it, and ends them."""
    if threading.current_thread() is not threading.main_thread():  # no other can set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
