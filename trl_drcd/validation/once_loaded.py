"""Check that the loaded model, tokenizer, codec and prompts fit each other, before sampling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import nlargest
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.policies import Policy, teacher_prompt_ids
from trl_drcd.policies.causal_lm import as_list, loop_refusal, without_peft
from trl_drcd.sampling import static_cache_refusal
from trl_drcd.validation.before_loading import leaves_sampling_to_trl
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.vllm import check_vllm

logger = get_logger(__name__)

LONGEST = 8  # prompts with the most bytes, which are tokenized to find the longest


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
    Check that model, tokenizer, codec and prompts fit each other, before sampling.

    Args:
        policy ([`Policy`]): The policy of the model's family.
        student (`PreTrainedModel`): The loaded model, unwrapped, with its adapter.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the prompts.
        train_dataset (`Dataset` or `IterableDataset`): Data set with a column `prompt`.
        args ([`CFGDistillDiversityConfig`]): The trainer's arguments.
        codec (`object`): The trainer's codec, or `None`.
        tokenize_prompts (`Callable`): Maps a list of prompts to a tuple whose first entry is their token ids.

    Raises:
        TypeError: If the codec has no `decode` method.
        ValueError: If two of them do not fit; the message says which, and how to fix it.
    """
    policy.check_length(args.max_completion_length or 0)
    _check_vocabulary(policy, student, tokenizer)
    _check_finite_weights(student)
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "`model` has no trainable weight: all are frozen, or an adapter was loaded without `is_trainable=True`; "
            "unfreeze it, or give a `peft_config`"
        )
    _warn_of_half_precision(student, args)
    _check_codec(codec, policy, student)
    _check_router_loss(student, args)
    check_vllm(student, args)
    _check_samplers(policy, args)
    _check_static_cache(policy, student, args)
    with _template_errors():
        kwargs: Any = args.chat_template_kwargs or {}
        _check_template(train_dataset, tokenizer, kwargs)
        _check_longest(policy, train_dataset, args, student, tokenize_prompts)
        if args.guidance_scale != 1:  # raises if the first row's negative prompt cannot be tokenized
            policy.negative_prompt_ids([next(iter(train_dataset))], args.negative_prompt)
    if any(head.softcap is not None for head in policy.heads(student)):
        logger.warning("This model soft-caps its logits, so guidance needs one more head projection per token.")


def check_lengths(
    policy: Policy,
    sequences: list[list[int]],
    what: str,
    max_completion_length: int | None,
    model: PreTrainedModel,
) -> None:
    """
    Check that the longest prompt and its completion fit the model's context. Prompts are never truncated.

    Where an encoder reads the prompts, `check_prompts` of the policy checks them, if there is one.

    Args:
        policy ([`Policy`]): The policy of the model's family.
        sequences (`list[list[int]]`): Token ids of the prompts.
        what (`str`): Description of the sequences, for the error message.
        max_completion_length (`int`, *optional*): Maximum number of completion tokens.
        model (`PreTrainedModel`): Its configuration gives `max_position_embeddings`; without it nothing is checked.

    Raises:
        ValueError: If the longest prompt and its completion exceed `max_position_embeddings`, or the position from
            which the rotary embedding is another (`longrope`).
    """
    if not policy.rolls_out_with_trl:
        if check := getattr(policy, "check_prompts", None):
            check(sequences, what)
        return
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if limit is not None and 0 < limit < longest + (max_completion_length or 0):  # below 0: none, of XLNet
        raise ValueError(
            f"{what} of {longest} tokens and `max_completion_length={max_completion_length}` do not fit the model, "
            f"which has {limit} positions; prompts are never truncated: shorten it, or the completions"
        )
    scaling = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    limit = scaling.get("original_max_position_embeddings") if scaling.get("rope_type") == "longrope" else None
    if limit is not None and longest + (max_completion_length or 0) > limit:
        raise ValueError(
            f"{what} of {longest} tokens and `max_completion_length={max_completion_length}` exceed the {limit} "
            "positions up to which this model has short rotary factors (`original_max_position_embeddings`): beyond "
            "them it reads all earlier tokens, and all shorter rows of a batch, in another way than they were "
            "sampled; shorten it, or the completions"
        )


# ---------------------------------------------------------------- model


def check_head(model: PreTrainedModel) -> None:
    """
    Check that the output head's weights are all of it: the loss applies them, without the rows that an adapter adds.

    Raises:
        ValueError: If an adapter trains rows of the head.
    """
    head = (model.get_base_model() if isinstance(model, PeftModel) else model).get_output_embeddings()
    if isinstance(head, BaseTunerLayer | TrainableTokensWrapper):
        raise ValueError(
            "`peft_config` trains rows of the output head (of a tied embedding too), which the loss would not see; "
            "leave out `trainable_token_indices`, or name the head in `modules_to_save`"
        )


def _check_vocabulary(policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer needs eos and pad ids, and no more tokens than the model has."""
    ends = tokenizer.eos_token_id is not None or not policy.rolls_out_with_trl  # else the family has an end of its own
    if not ends or tokenizer.pad_token_id is None:
        raise ValueError(
            "`processing_class` has no `eos_token`, which ends and pads completions; set `tokenizer.eos_token` to the "
            "token that the model was trained to end with"
        )
    size = policy.prompt_vocabulary(model)
    if len(tokenizer) > size:
        raise ValueError(
            f"`processing_class` has {len(tokenizer)} tokens and the model {size}: they do not share a "
            "vocabulary. Pass the model's own tokenizer, or resize the model's embeddings first"
        )


def _check_finite_weights(model: PreTrainedModel) -> None:
    """Every weight must be finite."""
    for name, weights in model.named_parameters():
        if weights.is_floating_point() and not weights.is_meta and not weights.detach().isfinite().all():
            raise ValueError(f"`model` holds NaN or infinite values in {name}; load weights that are finite")


def _warn_of_half_precision(model: PreTrainedModel, args: CFGDistillDiversityConfig) -> None:
    """Weights that are trained in half precision lose small updates, unless DeepSpeed or FSDP keeps float32 ones."""
    sharded = args.deepspeed or args.fsdp or {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & os.environ.keys()
    half = [p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    quantised = getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False)
    if half and not sharded and not quantised:  # TRL keeps the adapter of a quantised model in bfloat16
        logger.warning(
            f"{len(half)} tensors are trained in {str(half[0]).removeprefix('torch.')}, in which an update much "
            f"smaller than the weight is lost (`learning_rate={args.learning_rate}`). Load the model in float32 "
            "(`dtype`) and set `bf16=True` to compute in bfloat16, or train an adapter, whose weights are float32"
        )


def _check_codec(codec: object, policy: Policy, model: PreTrainedModel) -> None:
    """The codec must have `decode`, and its tokens must be in the model's vocabulary."""
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


def _check_samplers(policy: Policy, args: CFGDistillDiversityConfig) -> None:
    """Refuse sampling by TRL for a model whose own generation config suppresses tokens."""
    if getattr(policy, "allowed", None) is None:
        return
    for name, value in leaves_sampling_to_trl(args).items():
        raise ValueError(
            f"`{name}={value}` samples in TRL, which does not know the `suppress_tokens` of the model's "
            "generation config; leave it out, or remove `suppress_tokens` there"
        )


def _check_static_cache(policy: Policy, model: PreTrainedModel, args: CFGDistillDiversityConfig) -> None:
    """Refuse a static cache for a model whose layers keep less than all positions, or that `generate` samples."""
    if args.cache_implementation != "static":
        return
    own: Any = without_peft(model)
    reason = loop_refusal(own) if policy.rolls_out_with_trl else None
    if not torch.accelerator.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        reason = reason or "torch compiles for a CPU with a C++ compiler (CXX, or g++), and there is none"
    if reason := reason or static_cache_refusal(own.config):
        raise ValueError(
            f"`cache_implementation=static` is not supported for {type(own).__name__}: {reason}; leave it out"
        )


def _check_router_loss(model: PreTrainedModel, args: CFGDistillDiversityConfig) -> None:
    """Refuse the load-balancing loss of a mixture of experts: RLOO adds it, the loss of Eq. (5) does not have it."""
    if args.router_aux_loss_coef:
        raise ValueError(
            f"`router_aux_loss_coef={args.router_aux_loss_coef}` has no effect: the loss has only the distillation "
            "and reward terms; leave it out, or set 0"
        )
    config = model.config if args.router_aux_loss_coef is None else None
    if getattr(config, "router_aux_loss_coef", 0) and hasattr(config, "output_router_logits"):
        logger.warning(
            "The load-balancing loss of this mixture of experts is not used: distillation keeps the teacher's routing"
        )


# ---------------------------------------------------------------- prompts


@contextmanager
def _template_errors() -> Iterator[None]:
    """Turn errors of the chat template into a `ValueError` that names the argument."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"`train_dataset` has conversations that the chat template of `processing_class` rejects ({error}); "
            "use turns that it accepts, or another template"
        ) from error


def _check_template(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> None:
    """Conversations need a chat template, and system turns need one that renders them."""
    first = next(iter(dataset))["prompt"]
    if not isinstance(first, list):
        if tokenizer.chat_template is not None:
            logger.warning(
                "`train_dataset` has prompts that are texts, which this model continues without its chat template; if "
                "it was trained to answer, give lists of turns, or a `system_prompt`"
            )
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
        lost = isinstance(system, str) and system.strip() not in rendered and "it drops it"
    except TemplateError as error:
        lost = str(error)
    if lost:
        raise ValueError(
            f"`train_dataset` has a system turn, which the chat template of `processing_class` does not support "
            f"({lost}); put its text at the start of the user's turn, and do not set `system_prompt`"
        )


def _check_longest(
    policy: Policy,
    dataset: Dataset | IterableDataset,
    args: CFGDistillDiversityConfig,
    model: PreTrainedModel,
    tokenize: Callable[[list], tuple],
) -> None:
    """[`check_lengths`] on the prompts with the most bytes; streams are not checked."""
    if not isinstance(dataset, Dataset) or not (policy.rolls_out_with_trl or hasattr(policy, "check_prompts")):
        return  # the data is a stream, or an encoder without a limit reads the prompt
    longest = nlargest(LONGEST, dataset["prompt"], key=_size)
    parts = {"a prompt": tokenize(longest)[0]}
    if policy.rolls_out_with_trl and isinstance(longest[0], str):
        _warn_of_ended_prompt(longest[0], parts["a prompt"][0], model)
    if args.guidance_scale != 1:
        rows = dataset.select(range(1))
        if "negative_prompt" in dataset.column_names:
            negative = list(dataset["negative_prompt"])
            rows = dataset.select(nlargest(LONGEST, range(len(dataset)), key=lambda row: _size(negative[row])))
        parts["a negative prompt"] = policy.negative_prompt_ids(list(rows), args.negative_prompt)
    if "teacher_prompt" in dataset.column_names:
        taught = list(dataset["teacher_prompt"])
        longest = nlargest(LONGEST, range(len(dataset)), key=lambda row: _size(taught[row]))
        parts["a teacher's prompt"] = teacher_prompt_ids(policy, list(dataset.select(longest)))
    for what, ids in parts.items():
        check_lengths(policy, ids, f"`train_dataset`: {what}", args.max_completion_length, model)


def _warn_of_ended_prompt(prompt: str, ids: Sequence[int], model: PreTrainedModel) -> None:
    """A tokenizer that appends an end to texts makes of each prompt one that is over."""
    generation: Any = getattr(model, "generation_config", None)
    if ids and ids[-1] in as_list(getattr(generation, "eos_token_id", None)):
        logger.warning(
            f"`processing_class` ends prompts with {ids[-1]}, the model's end of a text, as {short_repr(prompt, 40)}: "
            "completions would follow it; set `tokenizer.add_eos_token = False`"
        )


def _size(prompt: object) -> int:
    """Number of bytes of a prompt (a text or a conversation)."""
    return len(str(prompt).encode(errors="replace"))
