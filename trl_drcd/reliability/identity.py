"""The identity of a run: the settings, data and model that a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn

from trl_drcd.mixture import EmbedderMixture

# Arguments that must not change on resume; paths, logging, saving and lengths may
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed"),
    *("max_grad_norm_diversity", "allowed_token_ids"),
    *("guidance_scale", "early_steps", "early_guidance_scale", "negative_prompt", "temperature"),
    *("diversity_coef", "diversity_warmup_steps"),
    *("diversity_credit", "gae_lambda", "diversity_prefixes", "diversity_hidden_states", "diversity_kernel"),
    *("num_generations", "num_iterations"),
    *("generation_batch_size", "max_completion_length", "reward_weights", "bf16", "fp16", "use_vllm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs", "epsilon", "epsilon_high"),
    *("steps_per_generation", "mask_truncated_completions", "normalize_advantages", "reward_clip_range"),
    *("chat_template_kwargs", "data_seed", "shuffle_dataset"),
)

TEXTS = ("prompt", "negative_prompt")  # columns of the data that are compared
NOT_OF_THE_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
VALUES = 4  # number of values of each tensor of the base and of a separate teacher that are compared


def run_identity(
    args: Any, model: Any, train_dataset: Any, teacher: Any = None, embedder: Any = None, rewards: Sequence[Any] = ()
) -> dict[str, str]:
    """
    The identity of a run, which a checkpoint must share with the run that resumes from it.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`PreTrainedModel`): The student, unwrapped.
        train_dataset (`Dataset` or `IterableDataset`): Training data; for a stream, only the columns are used.
        teacher (`PreTrainedModel`, *optional*): A teacher other than the initial model.
        embedder (`Callable`, *optional*): Whose diversity is rewarded.
        rewards (`Sequence`, *optional*): Further reward functions and models.

    Returns:
        `dict[str, str]`: Name to value.
    """
    values: dict[str, Any] = {name: getattr(args, name, None) for name in SETTINGS}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    values["model"] = f"{type(model).__name__} {_digest(shapes)}"
    values["base_weights"] = _weights(model)
    if isinstance(model, PeftModel):
        values["adapter"] = _adapter(model)
    values["teacher"] = "the initial model" if teacher is None else f"{type(teacher).__name__} {_weights(teacher)}"
    values["embedder"] = "none" if embedder is None else _embedder(embedder)
    values["reward_funcs"] = [_embedder(reward) for reward in rewards]
    if isinstance(train_dataset, Dataset):
        values["train_dataset"] = f"{len(train_dataset)} rows {_texts(train_dataset, TEXTS)}"
        values["teacher_prompts"] = _texts(train_dataset, ["teacher_prompt"])
    else:
        values["train_dataset"] = sorted(train_dataset.column_names or [])
    return {name: str(getattr(value, "value", value)) for name, value in values.items()}


def _weights(model: Any) -> str:
    """Digest of some values of each tensor; of a model with an adapter, of the base's, which the adapter's are not."""
    adapters = set(getattr(model, "peft_config", ()))
    own = [(n, p) for n, p in model.named_parameters() if not (p.is_meta or adapters & set(n.split(".")))]
    return _digest({name: p.detach().flatten()[:VALUES].tolist() for name, p in own})


def _embedder(embedder: Any) -> str:
    """Name of a function or class; of a network, or of what holds one as `model`, with a digest of its weights."""
    if isinstance(embedder, EmbedderMixture):
        parts = {name: [embedder.shares[name], _embedder(each)] for name, each in embedder.embedders.items()}
        return f"a mixture of {', '.join(parts)} {_digest(parts)}"
    name = getattr(embedder, "__qualname__", type(embedder).__qualname__)
    network = embedder if isinstance(embedder, nn.Module) else getattr(embedder, "model", None)
    return f"{name} {_weights(network)}" if isinstance(network, nn.Module) else str(name)


def _adapter(model: PeftModel) -> str:
    """Digest of the settings of the adapter that is trained, such as its scale, which is in no tensor's shape."""
    settings = model.active_peft_config.to_dict()
    kept = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ADAPTER}
    return _digest({name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()})


def _texts(dataset: Dataset, names: Sequence[str]) -> str:
    """Digest of the columns `names`, where the data has them."""
    digest = hashlib.sha256()
    columns = dataset.select_columns([name for name in names if name in dataset.column_names])
    for batch in columns.iter(batch_size=1000):
        digest.update(json.dumps(batch, default=str).encode())
    return digest.hexdigest()[:12]


def identity_problem(found: dict[str, str] | None, own: dict[str, str]) -> str | None:
    """The differences between the identities of a checkpoint and a run; `None` if there are none to compare."""
    if not found:
        return None
    # Until 30 November 2026 `warmup_steps` were ignored and the schedule stayed `constant`; such a run goes on
    same = {("constant", "constant_with_warmup")}
    pairs = {name: (found[name], own[name]) for name in own if name in found}
    different = [name for name, (then, now) in pairs.items() if then != now and (then, now) not in same]
    if not different:
        return None
    listed = ", ".join(f"`{name}` {found[name]} instead of {own[name]}" for name in different[:4])
    return f"it belongs to a different run: {listed}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
