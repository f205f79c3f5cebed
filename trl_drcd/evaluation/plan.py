"""Plan an evaluation: the held-out prompts and the rows, each with digests of everything its metrics depend on."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from trl_drcd.evaluation.allowed import further_end, suppressed_in
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.checks import check_metric_names, check_parts
from trl_drcd.evaluation.digests import content_digest, settings_digest, weights_digest
from trl_drcd.evaluation.judging import RewardFunction, is_function, source_file
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.sampling import Prompt
from trl_drcd.evaluation.strategies import Row, chosen, expand
from trl_drcd.files import local_name
from trl_drcd.merging.adapters import BASE
from trl_drcd.policies import policy_class
from trl_drcd.prompts import read_prompts, with_system_prompt
from trl_drcd.validation.rows import check_columns, check_rows

logger = logging.getLogger(__name__)
JUDGES = (
    "codec", "embedder", "second_embedder", "judge", "reference", "clap", "cross_encoder", "reward_model",
    "preference",
)  # fmt: skip
"""Arguments that name a codec, embedder or judge."""


@dataclass(frozen=True)
class HeldOut:
    """
    The prompts of an evaluation.

    Args:
        prompts (`list`): All different, texts or conversations.
        negative_prompts (`list`, *optional*): Each prompt's own x^-, `None` where it has none.
        teacher_prompts (`list`, *optional*): What is read with guidance in place of each prompt, `None` where it is
            the prompt.
    """

    prompts: list[Prompt]
    negative_prompts: list[Prompt | None] | None = None
    teacher_prompts: list[Prompt | None] | None = None


@dataclass(frozen=True)
class Task:
    """
    A row to be measured.

    Args:
        row ([`Row`]): Its settings.
        drawn (`str`): Digest of everything that its samples depend on.
        settings (`str`): Digest of everything that its metrics depend on.
        but_seed (`str`): The same without the seed and the batch size: of rows that are further samples of each other.
        but_model (`str`): The same without the models too: of rows that are further trainings of each other.
        but_row (`str`): Digest of base, prompts, lengths, dtype and judges: of rows that can be compared.
        but_prompts (`str`): The same without the prompts: of rows on further prompts.
        model_digest (`str`, *optional*): Digest of the weights of its model, if it is a single folder.
    """

    row: Row
    drawn: str
    settings: str
    but_seed: str = ""
    but_model: str = ""
    but_row: str = ""
    but_prompts: str = ""
    model_digest: str | None = None

    @property
    def tokens_file(self) -> str:
        """Name of the file of its token ids in `samples/`."""
        return f"{self.row.slug}_{self.drawn}.safetensors"

    @property
    def folder(self) -> str:
        """Name of the folder of its kept samples in `samples/`."""
        return f"{self.row.slug}_{self.settings}"

    def about(self, args: EvaluateArguments) -> Result:
        """Its line of `results.jsonl` without measurements."""
        row = self.row
        return Result(
            strategy=row.strategy,
            point=row.point,
            name=row.name,
            model=" + ".join(_model_name(name, row.checkpoint) for name in row.models or (args.model,)),
            weights=row.weights,
            guidance_scale=row.guidance_scale,
            early_steps=row.early_steps,
            early_guidance_scale=row.early_guidance_scale,
            temperature=row.temperature,
            diversity_coef=row.diversity_coef,
            interpolation_weight=row.interpolation_weight,
            training_seed=row.training_seed,
            checkpoint=row.checkpoint,
            seed=args.seed,
            prompts=args.num_prompts,
            samples_per_prompt=args.samples_per_prompt,
            negative_prompt=row.negative_prompt if row.guidance_scale != 1 else None,
            teacher_negative_prompt=args.negative_prompt,
            teacher_guidance_scale=args.guidance_scale,
            passes_per_token=1 if row.guidance_scale == 1 else 2,
            settings=self.settings,
            but_seed=self.but_seed,
            but_model=self.but_model,
            but_row=self.but_row,
            but_prompts=self.but_prompts,
            but_judges=self.drawn,
            model_digest=self.model_digest,
        )


def _model_name(name: str, checkpoint: int | None) -> str:
    """A model's name in results: for a checkpoint with its training's, `run/checkpoint-20`."""
    short = local_name(name)
    return short if checkpoint is None or name == BASE else f"{Path(name).resolve().parent.name}/{short}"


def plan(args: EvaluateArguments, extra_metrics: Mapping[str, RewardFunction]) -> tuple[HeldOut, list[Task]]:
    """
    Parse the arguments and check everything that can be checked before a model is loaded.

    Args:
        args ([`EvaluateArguments`]): Settings of the evaluation.
        extra_metrics (`dict`): Name of a metric to a callable with TRL's reward signature.

    Returns:
        `tuple`: The prompts, and the tasks in the order of the strategies.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If a strategy is invalid, or there are fewer prompts than `num_prompts`.
    """
    rows = expand(chosen(args.strategies, args.only))
    if args.omega == "equal" and args.preference and len({row.point for row in rows}) < 2:
        raise ValueError(f"`omega=equal` needs at least 2 points, got only `{rows[0].point}`; give a number")
    digest, weights = functools.cache(content_digest), functools.cache(weights_digest)
    check_parts(args, digest)
    check_metric_names(extra_metrics)
    held_out = held_out_prompts(args)
    judged = [
        [_judge_digest(name, digest) if (name := getattr(args, judge)) else None for judge in JUDGES],
        [args.guidance_scale, args.negative_prompt, args.prompt_information, args.metrics],
        [_source_digest(name, digest) for name in args.metrics],
        [[name, _function_digest(function, digest)] for name, function in extra_metrics.items()],
        [args.listen, args.listen_samples],
    ]
    if held_out.teacher_prompts:
        judged.append(list(held_out.teacher_prompts))
    if args.scored_samples != args.samples_per_prompt:
        judged.append(["likelihood_samples", args.scored_samples])
    suppressed = suppressed_in(args)
    further = further_end(args.model) if policy_class(args.model).rolls_out_with_trl else None
    shared = [digest(args.model), args.max_new_tokens, args.dtype, args.allowed_token_ids, args.chat_template_kwargs]
    but_row = settings_digest([shared, held_out.prompts, held_out.teacher_prompts, judged[:4]])
    but_prompts = settings_digest([shared, judged[:4]])
    tasks = []
    for row in rows:
        drawn, but_seed, but_model = (
            sampling_digest(row, args, held_out, digest, suppressed, further, *counted)
            for counted in ((True, True), (False, True), (False, False))
        )
        settings, but_seed, but_model = (settings_digest([each, judged]) for each in (drawn, but_seed, but_model))
        name = row.models[0] if row.models else args.model
        one_folder = len(row.models) < 2 and Path(name).is_dir()
        own = weights(name) if one_folder else None
        tasks.append(Task(row, drawn, settings, but_seed, but_model, but_row, but_prompts, own))
    return held_out, tasks


def held_out_prompts(args: EvaluateArguments) -> HeldOut:
    """
    The `num_prompts` distinct prompts of the data set that follow the first `skip_prompts`, with their negative and
    teacher prompts if it has them.

    Raises:
        ValueError: If there are too few, or there is a column that the base's family does not read.
    """
    data = read_prompts("dataset", args.dataset, args.dataset_split, keep_columns=True)
    if args.system_prompt:
        data = data.map(with_system_prompt, fn_kwargs={"system_prompt": args.system_prompt})
    check_rows(data, where := f"`dataset={args.dataset}`")
    check_columns(where, data.column_names, getattr(policy_class(args.model), "refused_columns", ()))
    first: dict[str, tuple[Prompt, Prompt | None, Prompt | None]] = {}
    others = (
        data[name] if name in data.column_names else [None] * len(data)
        for name in ("negative_prompt", "teacher_prompt")
    )
    wanted = args.skip_prompts + args.num_prompts
    for row in zip(data["prompt"], *others, strict=True):
        if len(first) < wanted:
            first.setdefault(json.dumps(row[0]), row)
    if len(first) < wanted:
        skipped = f" after `skip_prompts={args.skip_prompts}`" if args.skip_prompts else ""
        raise ValueError(
            f"`dataset={args.dataset}` has {len(first)} distinct prompts, but `num_prompts` is {args.num_prompts}"
            f"{skipped}"
        )
    kept = list(first.values())[args.skip_prompts :]
    prompts, own, taught = (list(column) for column in zip(*kept, strict=True))
    # An empty text is a prompt of its own, the null prompt
    return HeldOut(prompts, *(column if any(x is not None for x in column) else None for column in (own, taught)))


def sampling_digest(
    row: Row,
    args: EvaluateArguments,
    held_out: HeldOut,
    digest: Callable[[str], str],
    suppressed: list[int] | None = None,
    further_end: int | None = None,
    seed: bool = True,
    models: bool = True,
) -> str:
    """
    Digest of everything that the samples of a row depend on; without `seed`, of everything that their distribution
    depends on; without `models`, but for the models of the row.

    Models count by content, not by name, and models of weight 0 are left out, so that the end of a sweep of lambda
    has the digest of the model itself.
    """
    mixed = zip(row.models, row.weights, strict=True)
    ends: list[object] = [row.weights]
    if models:
        ends = [(digest(name), weight) for name, weight in mixed if weight and name != BASE]
    guided = row.guidance_scale != 1
    guidance = [row.guidance_scale, row.negative_prompt] if guided else None
    how: list[object] = [args.samples_per_prompt, args.max_new_tokens, args.dtype]
    if seed:
        how = [args.samples_per_prompt, args.max_new_tokens, args.batch_size, args.dtype, args.seed]
    settings: list[object] = [[digest(args.model), *ends], [row.temperature, guidance], how, held_out.prompts]
    if row.early is not None:
        settings.append({"early": [row.early_steps, row.early_guidance_scale]})
    if guided and held_out.negative_prompts:
        settings.append(held_out.negative_prompts)
    if args.chat_template_kwargs:
        settings.append(args.chat_template_kwargs)
    if guided and held_out.teacher_prompts:
        settings.append({"teacher_prompts": held_out.teacher_prompts})
    if args.allowed_token_ids or suppressed:
        settings.append({"allowed": args.allowed_token_ids, "suppressed": suppressed})
    if further_end is not None:
        settings.append({"end": further_end})
    return settings_digest(settings)


def _judge_digest(name: str, digest: Callable[[str], str]) -> str:
    return _source_digest(name, digest) if is_function(name) else digest(name)


def _source_digest(name: str, digest: Callable[[str], str]) -> str:
    """The name of a function, `module.function`, with the digest of its module's source."""
    file = source_file(name)
    return f"{name} {digest(str(file)) if file else ''}"


def _function_digest(function: Any, digest: Callable[[str], str]) -> str:
    """
    Digest of a callable: of the source of its module, and of what it holds, such as the attributes of an object, the
    arguments of a `functools.partial`, or the variables of a closure. What cannot be hashed is new each time.
    """
    whole = function
    while isinstance(function, functools.partial):
        function = function.func
    try:
        file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:
        file = None
    try:
        held = Hasher.hash(whole)
    except Exception as error:  # any error of a foreign object's own pickling
        logger.warning(f"the metric {function!r} cannot be hashed ({error}), so that it is measured anew each time")
        held = secrets.token_hex()
    return settings_digest([digest(file) if file else "", held])


def unmeasured(tasks: Iterable[Task], done: Mapping[str, Result]) -> list[Task]:
    """The tasks that are not done yet, one for each `settings`."""
    waiting: dict[str, Task] = {}
    for task in tasks:
        if task.settings not in done:
            waiting.setdefault(task.settings, task)
    return list(waiting.values())
