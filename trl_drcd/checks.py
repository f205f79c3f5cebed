"""What the trainer refuses, before any model is loaded or any token is sampled."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel, PromptLearningConfig

from .config import CFGDistillDiversityConfig
from .diversity import DiversityReward
from .policies import Policy


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Every data set must have prompts; found out before a model is loaded."""
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evals}.items():
        if dataset is None and name != "train_dataset":
            continue
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}")
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"`{name}` is empty; it must have at least one row with a `prompt`")
        if dataset.column_names is not None and "prompt" not in dataset.column_names:
            raise ValueError(f"`{name}` must have a column `prompt`, got columns {dataset.column_names}")


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
    if any(p.detach().abs().max() > 0 for _, p in parts):
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


def check_null_prompt(policy: Policy, dataset: Any, negative_prompt: Any) -> None:
    """Fails on the first row if the tokenizer has no rendering of its negative prompt."""
    policy.negative_prompt_ids([next(iter(dataset))], negative_prompt)


def check_vocabulary(policy: Policy, model: Any, tokenizer: Any) -> None:
    """Prompts must not hold tokens that student and teacher do not have."""
    size = policy.prompt_vocabulary(model)
    if len(tokenizer) > size:
        raise ValueError(
            f"`processing_class` has {len(tokenizer)} tokens and the model {size}: they do not share a "
            "vocabulary. Give the model's own tokenizer, or resize the model's embeddings before"
        )


def check_lengths(sequences: list[list[int]], what: str, max_completion_length: int | None, model: Any) -> None:
    """Nothing is cut: what is longer than the model can read, its completion included, is an error."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if limit is not None and longest + (max_completion_length or 0) > limit:
        raise ValueError(
            f"{what} of {longest} tokens and `max_completion_length={max_completion_length}` do not fit the model, "
            f"which reads {limit} positions; prompts are never cut: shorten it, or the completions"
        )
