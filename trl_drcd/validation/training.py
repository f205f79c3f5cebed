"""What the trainer refuses, before any model is loaded or any token is sampled."""

from __future__ import annotations

from heapq import nlargest
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.diversity import DiversityReward
from trl_drcd.policies import Policy, policy_class
from trl_drcd.validation.model_folders import check_model
from trl_drcd.validation.rows import check_rows

logger = get_logger(__name__)


def check_before_loading(
    model: Any,
    args: CFGDistillDiversityConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    extra_rewards: list,
    embedder: Any,
) -> None:
    """The first pass, of what the trainer was given, before a model is loaded."""
    check_datasets(train_dataset, eval_dataset)
    check_rollout_size(train_dataset, args)
    check_names(model, args, processing_class, peft_config)
    check_adapter(model, peft_config)
    check_rewards(args, extra_rewards, embedder)
    init_kwargs: Any = args.model_init_kwargs or {}
    check_family(policy_class(model, init_kwargs.get("revision")), args)


def check_once_loaded(
    policy: Policy,
    student: Any,
    tokenizer: Any,
    train_dataset: Any,
    args: CFGDistillDiversityConfig,
    codec: Any,
    tokenize_prompts: Any,
) -> None:
    """The second pass, of the loaded model with its tokenizer, before anything is sampled."""
    check_vocabulary(policy, student, tokenizer)
    check_finite_weights(student)
    check_codec(codec, policy, student)
    check_longest(policy, train_dataset, args, student, tokenize_prompts)
    if args.guidance_scale != 1:
        check_null_prompt(policy, train_dataset, args.negative_prompt)
    if any(head.softcap is not None for head in policy.heads(student)):
        logger.warning("This model caps its logits: guidance is applied to the logits, one more projection per token.")


def check_skipping(args: CFGDistillDiversityConfig, deepspeed: bool) -> None:
    """DeepSpeed updates by itself: nothing can be skipped."""
    if deepspeed and args.on_bad_batch == "skip":
        raise ValueError("`on_bad_batch='skip'` does not go with DeepSpeed, which updates by itself; set 'stop'")


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Every data set must have prompts; found out before a model is loaded."""
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evals}.items():
        if dataset is None and name != "train_dataset":
            continue
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}")
        check_rows(dataset, f"`{name}`")


def check_rollout_size(train_dataset: Any, args: CFGDistillDiversityConfig) -> None:
    """A rollout takes that many different prompts; TRL's sampler drops what does not fill one, here everything."""
    prompts = (args.generation_batch_size or 0) // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} rows, but one rollout takes {prompts} prompts "
            f"(`generation_batch_size={args.generation_batch_size}` / `num_generations={args.num_generations}`), so "
            "there would be no step; give more prompts, or lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`"
        )


def check_rewards(args: CFGDistillDiversityConfig, extra_rewards: list, embedder: Any) -> None:
    """Rewards, their weights and the embedder must fit together."""
    if any(isinstance(reward, DiversityReward) for reward in extra_rewards):
        raise ValueError(
            "`reward_funcs` holds a `DiversityReward`; RLOO's leave-one-out baseline is biased for it. Pass its "
            "embedder as `embedder=` (and `codec=`) and its weight as `diversity_coef`"
        )
    if embedder is None and args.diversity_coef > 0:
        raise ValueError(f"`diversity_coef={args.diversity_coef}` needs `embedder`, got None")
    if embedder is not None and args.num_generations_eval == 1:
        raise ValueError("`num_generations_eval=1` leaves nothing to compare; diversity needs at least 2")
    if not extra_rewards and args.reward_weights is not None:
        raise ValueError(f"`reward_weights={args.reward_weights}` without `reward_funcs`; set `reward_weights=None`")


def check_adapter(model: Any, peft_config: Any) -> None:
    """The teacher is the model with its adapter off, so a new adapter must not yet have changed anything."""
    if isinstance(peft_config, PromptLearningConfig):
        raise ValueError(
            f"`peft_config` of type {type(peft_config).__name__} adds virtual tokens that the loss would not "
            "see; use LoRA"
        )
    if not isinstance(model, PeftModel):
        return
    parts = [(name, p) for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if not parts:
        raise ValueError(
            "`model` is a `PeftModel` without LoRA weights, so whether its adapter is still neutral cannot be told; "
            "pass the base model and a `peft_config`"
        )
    if any(p.detach().any() for _, p in parts):
        raise ValueError(
            "`model` has an adapter that was already trained, and the teacher would be the base without it. Merge "
            "it (`model.merge_and_unload()`) and pass the merged model with a new `peft_config`"
        )


def check_family(family: Any, args: CFGDistillDiversityConfig) -> None:
    """What is TRL's own way to sample serves causal LMs alone."""
    if family.rolls_out_with_trl:
        return
    for name in ("use_vllm", "use_transformers_continuous_batching", "mask_truncated_completions"):
        if getattr(args, name):
            raise ValueError(f"`{name}=True` does not serve this family of models; set it to False")
    if args.beta != 0:
        raise ValueError(f"`beta={args.beta}`, TRL's KL penalty, does not serve this family of models; set it to 0")


def check_names(model: Any, args: CFGDistillDiversityConfig, processing_class: Any, peft_config: Any) -> None:
    """What the model is loaded from, and what comes with it, must be of the kinds that the trainer takes."""
    if isinstance(model, str):
        if not {"subfolder", "variant", "gguf_file"} & set(
            args.model_init_kwargs or {}
        ):  # else its files lie elsewhere
            check_model("model", model, args.trust_remote_code)
    elif not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a name, a folder or a loaded model, got {type(model).__name__}")
    elif not hasattr(model, "generate") or model.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a {type(model).__name__}, which generates nothing; give a causal LM or a MusicGen"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        raise TypeError(
            f"`processing_class` must be a tokenizer, or `None` for the model's, got {type(processing_class).__name__}"
        )
    if not isinstance(peft_config, PeftConfig | None):
        raise TypeError(f"`peft_config` must be a `LoraConfig`, got {type(peft_config).__name__}")


def check_finite_weights(model: Any) -> None:
    """What is NaN or infinite can neither be trained nor teach."""
    for name, weights in model.named_parameters():
        if weights.is_floating_point() and not weights.is_meta and not weights.detach().isfinite().all():
            raise ValueError(f"`model` holds NaN or infinite values in {name}; load weights that are finite")


def check_codec(codec: Any, policy: Policy, model: Any) -> None:
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


def check_null_prompt(policy: Policy, dataset: Any, negative_prompt: Any) -> None:
    """Fails on the first row if the tokenizer has no rendering of its negative prompt."""
    policy.negative_prompt_ids([next(iter(dataset))], negative_prompt)


def check_vocabulary(policy: Policy, model: Any, tokenizer: Any) -> None:
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


def check_longest(policy: Policy, dataset: Any, args: CFGDistillDiversityConfig, model: Any, tokenize: Any) -> None:
    """[`check_lengths`] of the prompts that are longest as texts, before any is sampled; not of a stream."""
    if not policy.rolls_out_with_trl:
        return  # an encoder reads the prompt
    if not isinstance(dataset, Dataset):
        return
    parts = {"a prompt": tokenize(nlargest(8, dataset["prompt"], key=_size))[0]}
    if args.guidance_scale != 1:
        rows = dataset.select(range(1))
        if "negative_prompt" in dataset.column_names:
            negative = list(dataset["negative_prompt"])
            rows = dataset.select(nlargest(8, range(len(dataset)), key=lambda row: _size(negative[row])))
        parts["a negative prompt"] = policy.negative_prompt_ids(list(rows), args.negative_prompt)
    for what, ids in parts.items():
        check_lengths(ids, f"`train_dataset`: {what}", args.max_completion_length, model)


def _size(prompt: Any) -> int:
    """Characters of a prompt, a text or a conversation."""
    return len(str(prompt))


def check_lengths(sequences: list[list[int]], what: str, max_completion_length: int | None, model: Any) -> None:
    """Nothing is cut: what is longer than the model can read, its completion included, is an error."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if limit is not None and longest + (max_completion_length or 0) > limit:
        raise ValueError(
            f"{what} of {longest} tokens and `max_completion_length={max_completion_length}` do not fit the model, "
            f"which reads {limit} positions; prompts are never cut: shorten it, or the completions"
        )
