"""Validate the values of the trainer's config."""

from __future__ import annotations

import json
import math
import os
from typing import Protocol

from trl_drcd.validation.messages import is_valid_unicode, short_repr
from trl_drcd.validation.ranges import Range, check_ranges


class Settings(Protocol):
    """The fields of a `CFGDistillDiversityConfig` that are checked here individually."""

    guidance_scale: float
    early_steps: int
    early_guidance_scale: float
    max_completion_length: int | None
    diversity_warmup_steps: float
    reward_weights: list[float] | None
    beta: float
    on_bad_batch: str
    diversity_credit: str
    diversity_hidden_states: bool | None
    gae_lambda: float
    max_grad_norm_diversity: float | None
    fp16: bool
    generation_kwargs: dict | str | None
    disable_dropout: bool
    cache_implementation: str | None
    neftune_noise_alpha: float | None
    generation_batch_size: int | None
    steps_per_generation: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_generations: int
    negative_prompt: str | None
    sample_prompts: list[str] | None


RANGES = {
    "guidance_scale": Range(1, hint="the paper's is 3"),
    "early_steps": Range(0, hint="0 guides every step alike, as in the paper"),
    "early_guidance_scale": Range(0, hint="1 is the base model"),
    "temperature": Range(0, above=True, hint="the paper's is 0.99"),
    "diversity_coef": Range(0),
    "diversity_warmup_steps": Range(0),
    "learning_rate": Range(0),
    "num_generations": Range(
        2, hint="diversity compares generations of one prompt, and TRL's sampler always needs at least 2"
    ),
    "gae_lambda": Range(0),
    "diversity_prefixes": Range(1),
    "max_grad_norm_diversity": Range(0, above=True, hint="leave it out to clip the sum of all terms"),
    "sample_steps": Range(0),
    "per_device_train_batch_size": Range(1),
    "gradient_accumulation_steps": Range(1),
    "max_completion_length": Range(1),
    "ddp_timeout": Range(1),
}
CHOICES = {
    "on_bad_batch": ("stop", "skip"),
    "diversity_credit": ("sequence", "critic"),
    "diversity_kernel": ("pairs", "logdet", "vendi"),
}
# Values that leave the sampled distribution unchanged; error messages suggest the first one
NEUTRAL = {
    "top_k": (0, -1, None),
    "top_p": (1.0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0, None),
    "vllm_structured_outputs_regex": (None,),
}
HARMLESS_GENERATION_KWARGS = {"cache_implementation", "cache_config", "compile_config", "disable_compile"}


def check_settings(args: Settings) -> None:
    """
    Check the values of a config that are invalid for any model and data.

    Args:
        args (`CFGDistillDiversityConfig`): The config; the types of its fields are already checked.

    Raises:
        ValueError: At the first invalid value.
    """
    check_ranges(args, RANGES)
    _check_sampling(args)
    _check_guidance(args)
    _check_reward(args)
    _check_rollout(args)
    _check_texts(args)


def _check_sampling(args: Settings) -> None:
    """Refuse options that make the sampled distribution differ from the scored one."""
    for name, allowed in NEUTRAL.items():
        if (value := getattr(args, name)) not in allowed:
            raise ValueError(
                f"`{name}={value}` samples from a different distribution than the one scored by the KL and the policy "
                f"gradient; set `{name}={allowed[0]}`"
            )
    if changed := sorted(set(_generation_kwargs(args)) - HARMLESS_GENERATION_KWARGS):
        raise ValueError(
            f"`generation_kwargs` has {changed}, which may change the sampled distribution or the length without the "
            f"trainer knowing; allowed are {sorted(HARMLESS_GENERATION_KWARGS)}"
        )
    if "quantized" in (args.cache_implementation, _generation_kwargs(args).get("cache_implementation")):
        raise ValueError(
            "`cache_implementation=quantized` samples from rounded keys and values, which the loss does not score; "
            "leave it out"
        )
    if args.neftune_noise_alpha:
        raise ValueError(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` scores with noise on the embeddings, without which the "
            "model samples; leave it out"
        )
    if not args.disable_dropout:
        raise ValueError(
            "`disable_dropout=False` would score with a different network than the one that sampled; set it to True"
        )


def _check_guidance(args: Settings) -> None:
    """Refuse what has no effect without guidance or early steps, and early steps that are all steps."""
    if args.early_steps and args.guidance_scale == 1:
        raise ValueError(
            f"`early_steps={args.early_steps}` needs a `guidance_scale` other than 1, which turns guidance off"
        )
    if args.negative_prompt is not None and args.guidance_scale == 1:
        raise ValueError(
            f"`negative_prompt={short_repr(args.negative_prompt)}` needs a `guidance_scale` other than 1, which turns "
            "guidance off; leave it out"
        )
    if args.early_guidance_scale != 1 and not args.early_steps:
        raise ValueError(f"`early_guidance_scale={args.early_guidance_scale}` needs `early_steps`, which is 0")
    if args.max_completion_length is not None and args.early_steps >= args.max_completion_length:
        raise ValueError(
            f"`early_steps={args.early_steps}` must be below `max_completion_length="
            f"{args.max_completion_length}`: no later step would be left"
        )


def _generation_kwargs(args: Settings) -> dict[str, object]:
    """`generation_kwargs` as a dict; the field may be a JSON string."""
    given: object = args.generation_kwargs or {}
    try:
        kwargs = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError(f"`generation_kwargs={short_repr(given)}` must be a mapping, or one in JSON")
    return kwargs


def _check_reward(args: Settings) -> None:
    """Refuse options that conflict with the objective or with each other."""
    if not all(map(math.isfinite, args.reward_weights or [])):
        raise ValueError(f"`reward_weights` must be finite, got {args.reward_weights}")
    if args.beta != 0:
        raise ValueError(
            f"`beta={args.beta}` is TRL's KL penalty to the base without guidance, which conflicts with the guided "
            "teacher; set `beta=0` (the paper's beta is `diversity_coef`)"
        )
    steps = args.diversity_warmup_steps
    if steps > 1 and not float(steps).is_integer():
        raise ValueError(
            f"`diversity_warmup_steps` must be a whole number of steps, or a share of the run below 1, got {steps}"
        )
    for name, choices in CHOICES.items():
        if (value := getattr(args, name)) not in choices:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}")
    if args.diversity_hidden_states and args.diversity_credit == "sequence":
        raise ValueError(
            "`diversity_hidden_states=True` is read by the critic, which `diversity_credit='sequence'` has not; set "
            "`diversity_credit='critic'`"
        )
    if not args.gae_lambda <= 1:
        raise ValueError(f"`gae_lambda` must be between 0 and 1, got {args.gae_lambda}")
    if args.max_grad_norm_diversity is not None and args.fp16:
        raise ValueError(
            f"`max_grad_norm_diversity={args.max_grad_norm_diversity}` does not work with the gradient scaler of "
            "`fp16=True`; use `bf16`"
        )
    if args.on_bad_batch == "skip" and args.fp16:
        raise ValueError("`on_bad_batch='skip'` does not work with the gradient scaler of `fp16=True`; use `bf16`")


def _check_rollout(args: Settings) -> None:
    """A rollout must consist of whole groups; TRL checks this if other fields set its size."""
    if args.generation_batch_size is not None or args.steps_per_generation is not None:
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))  # the process group is not initialised yet
    rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if rollout % args.num_generations:
        raise ValueError(
            f"`per_device_train_batch_size={args.per_device_train_batch_size}` x `gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}` x {processes} processes are {rollout} sequences, which must be a "
            f"multiple of `num_generations={args.num_generations}`; change one of them"
        )


def _check_texts(args: Settings) -> None:
    """Refuse prompts that are empty or not valid Unicode."""
    prompts = args.sample_prompts
    if prompts is not None and not (prompts and all(map(str.strip, prompts))):
        raise ValueError(
            f"`sample_prompts` must have at least one prompt and no empty one, got {prompts}; leave it out to use the "
            "first prompts of the data"
        )
    texts = {"negative_prompt": [args.negative_prompt or ""], "sample_prompts": prompts or []}
    for name, values in texts.items():
        for text in values:
            if not is_valid_unicode(text):
                raise ValueError(
                    f"`{name}` must be valid Unicode, got {short_repr(text)}, which has an unpaired surrogate"
                )
