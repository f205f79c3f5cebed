"""The second pass: what the loaded model, its tokenizer and the prompts are to each other, before any is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import nlargest
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.policies import Policy

logger = get_logger(__name__)

LONGEST = 8  # prompts, as texts, of which one has the most tokens


def check_once_loaded(
    policy: Policy,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | IterableDataset,
    args: CFGDistillDiversityConfig,
    codec: object,
    tokenize_prompts: Callable[[list], tuple],
) -> None:
    """
    Refuse a model, a tokenizer, a codec and prompts that do not fit each other, before anything is sampled.

    Args:
        policy ([`Policy`]): Of the model's family.
        student (`PreTrainedModel`): Loaded, unwrapped, with its adapter.
        tokenizer (`PreTrainedTokenizerBase`): That prompts go through.
        train_dataset (`Dataset` or `IterableDataset`): With a column `prompt`.
        args ([`CFGDistillDiversityConfig`]): The trainer's.
        codec (`object`): The trainer's, or `None`.
        tokenize_prompts (`Callable`): Prompts to a tuple whose first entry is their token ids.

    Raises:
        TypeError: If the codec cannot decode.
        ValueError: If two of them do not fit; the message says which, and what would be right.
    """
    _check_vocabulary(policy, student, tokenizer)
    _check_finite_weights(student)
    _check_codec(codec, policy, student)
    _check_router_loss(student, args)
    with _template_errors():
        kwargs: Any = args.chat_template_kwargs or {}
        _check_template(train_dataset, tokenizer, kwargs)
        _check_longest(policy, train_dataset, args, student, tokenize_prompts)
        if args.guidance_scale != 1:  # fails where the tokenizer has no rendering of the first row's negative prompt
            policy.negative_prompt_ids([next(iter(train_dataset))], args.negative_prompt)
    if any(head.softcap is not None for head in policy.heads(student)):
        logger.warning("This model caps its logits: guidance is applied to the logits, one more projection per token.")


def check_skipping(args: CFGDistillDiversityConfig, deepspeed: bool) -> None:
    """DeepSpeed updates by itself: nothing can be skipped."""
    if deepspeed and args.on_bad_batch == "skip":
        raise ValueError("`on_bad_batch='skip'` does not go with DeepSpeed, which updates by itself; set 'stop'")


def check_lengths(
    sequences: Sequence[Sequence[int]], what: str, max_completion_length: int | None, model: PreTrainedModel
) -> None:
    """
    Nothing is cut: what is longer than the model can read, its completion included, is an error.

    Args:
        sequences (`Sequence[Sequence[int]]`): Token ids of prompts.
        what (`str`): What they are, for the message.
        max_completion_length (`int`, *optional*): Tokens that follow each.
        model (`PreTrainedModel`): Whose configuration says how many positions it reads.

    Raises:
        ValueError: If the longest one does not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if limit is not None and longest + (max_completion_length or 0) > limit:
        raise ValueError(
            f"{what} of {longest} tokens and `max_completion_length={max_completion_length}` do not fit the model, "
            f"which reads {limit} positions; prompts are never cut: shorten it, or the completions"
        )


# ---------------------------------------------------------------- model


def _check_vocabulary(policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts must not hold tokens that student and teacher do not have, and completions must be able to end."""
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            "`processing_class` has no `eos_token`, which ends and pads completions; set `tokenizer.eos_token` to the "
            "token that the model was trained to end with"
        )
    size = policy.prompt_vocabulary(model)
    if len(tokenizer) > size:
        raise ValueError(
            f"`processing_class` has {len(tokenizer)} tokens and the model {size}: they do not share a "
            "vocabulary. Give the model's own tokenizer, or resize the model's embeddings before"
        )


def _check_finite_weights(model: PreTrainedModel) -> None:
    """What is NaN or infinite can neither be trained nor teach."""
    for name, weights in model.named_parameters():
        if weights.is_floating_point() and not weights.is_meta and not weights.detach().isfinite().all():
            raise ValueError(f"`model` holds NaN or infinite values in {name}; load weights that are finite")


def _check_codec(codec: object, policy: Policy, model: PreTrainedModel) -> None:
    """A codec makes audio, of tokens that the model has."""
    if codec is None:
        return
    if not callable(getattr(codec, "decode", None)):
        raise TypeError(f"`codec` must have a method `decode(token_ids)`, got {type(codec).__name__}")
    if isinstance(codec, SpectralCodec) and not policy.has_own_codec:
        last = codec.first_token_id + codec.num_codebooks * codec.codebook_size - 1
        if last >= (size := policy.prompt_vocabulary(model)):
            raise ValueError(
                f"`codec` reads tokens {codec.first_token_id} to {last}, beyond the model's vocabulary of {size}; "
                "give the codec that the model was trained with"
            )


def _check_router_loss(model: PreTrainedModel, args: CFGDistillDiversityConfig) -> None:
    """RLOO adds the load-balancing loss of a mixture of experts; the loss here is that of Eq. (5) alone."""
    if args.router_aux_loss_coef:
        raise ValueError(
            f"`router_aux_loss_coef={args.router_aux_loss_coef}` is not added to the loss, which is distillation "
            "and reward alone; leave it out, or set 0"
        )
    config = model.config if args.router_aux_loss_coef is None else None
    if getattr(config, "router_aux_loss_coef", 0) and hasattr(config, "output_router_logits"):
        logger.warning(
            "The load-balancing loss of this mixture of experts is not added: the teacher keeps its balance"
        )


# ---------------------------------------------------------------- prompts


@contextmanager
def _template_errors() -> Iterator[None]:
    """What a chat template refuses, with the name of what was given to it."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"`train_dataset` holds conversations that the chat template of `processing_class` refuses ({error}); "
            "give turns that it takes, or another template"
        ) from error


def _check_template(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> None:
    """Conversations need a chat template, and system turns one that shows them to the model."""
    first = next(iter(dataset))["prompt"]
    if not isinstance(first, list):
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            "`train_dataset` holds conversations, and `processing_class` has no chat template; give prompts as texts, "
            "or set `tokenizer.chat_template`"
        )
    prompts = dataset["prompt"] if isinstance(dataset, Dataset) else [first]
    turns = next((turns for turns in prompts if any(turn["role"] == "system" for turn in turns)), None)
    if turns is None:
        return
    system = next(turn["content"] for turn in turns if turn["role"] == "system")
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs))
        lost = isinstance(system, str) and system.strip() not in rendered and "it leaves it out"
    except TemplateError as error:
        lost = str(error)
    if lost:
        raise ValueError(
            f"`train_dataset` has a system turn, which the chat template of `processing_class` has no place for "
            f"({lost}); write it at the beginning of the user's turn, and leave `system_prompt` out"
        )


def _check_longest(
    policy: Policy,
    dataset: Dataset | IterableDataset,
    args: CFGDistillDiversityConfig,
    model: PreTrainedModel,
    tokenize: Callable[[list], tuple],
) -> None:
    """[`check_lengths`] of the prompts that are longest as texts, before any is sampled; not of a stream."""
    if not policy.rolls_out_with_trl or not isinstance(dataset, Dataset):
        return  # an encoder reads the prompt, or nobody knows them all
    parts = {"a prompt": tokenize(nlargest(LONGEST, dataset["prompt"], key=_size))[0]}
    if args.guidance_scale != 1:
        rows = dataset.select(range(1))
        if "negative_prompt" in dataset.column_names:
            negative = list(dataset["negative_prompt"])
            rows = dataset.select(nlargest(LONGEST, range(len(dataset)), key=lambda row: _size(negative[row])))
        parts["a negative prompt"] = policy.negative_prompt_ids(list(rows), args.negative_prompt)
    for what, ids in parts.items():
        check_lengths(ids, f"`train_dataset`: {what}", args.max_completion_length, model)


def _size(prompt: object) -> int:
    """Characters of a prompt, a text or a conversation."""
    return len(str(prompt))
