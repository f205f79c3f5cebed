"""The identity of a run: the settings, data and model that a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datasets import Dataset

# Arguments that must not change on resume; paths, logging, saving and lengths may
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed"),
    *("max_grad_norm_diversity", "allowed_token_ids"),
    *("guidance_scale", "negative_prompt", "temperature", "diversity_coef", "diversity_warmup_steps"),
    *("diversity_credit", "gae_lambda", "diversity_prefixes", "diversity_kernel", "num_generations", "num_iterations"),
    *("generation_batch_size", "max_completion_length", "reward_weights", "bf16", "fp16"),
)

ROWS = 256  # number of first and of last rows of the data that are compared
VALUES = 4  # number of values of each tensor of a separate teacher that are compared


def run_identity(args: Any, model: Any, train_dataset: Any, teacher: Any = None) -> dict[str, str]:
    """
    The identity of a run, which a checkpoint must share with the run that resumes from it.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        model (`PreTrainedModel`): The student, unwrapped.
        train_dataset (`Dataset` or `IterableDataset`): Training data; for a stream, only the columns are used.
        teacher (`PreTrainedModel`, *optional*): A teacher other than the initial model.

    Returns:
        `dict[str, str]`: Name to value.
    """
    values: dict[str, Any] = {name: getattr(args, name, None) for name in SETTINGS}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    values["model"] = f"{type(model).__name__} {_digest(shapes)}"
    values["teacher"] = "the initial model"
    if teacher is not None:
        some = {name: p.detach().flatten()[:VALUES].tolist() for name, p in teacher.named_parameters()}
        values["teacher"] = f"{type(teacher).__name__} {_digest(some)}"
    columns = sorted(train_dataset.column_names or [])
    if isinstance(train_dataset, Dataset):
        ends = [*range(min(ROWS, len(train_dataset))), *range(max(0, len(train_dataset) - ROWS), len(train_dataset))]
        values["train_dataset"] = f"{len(train_dataset)} rows {_digest(train_dataset.select(ends)['prompt'][:])}"
    else:
        values["train_dataset"] = columns
    return {name: str(getattr(value, "value", value)) for name, value in values.items()}


def identity_problem(found: dict[str, str] | None, own: dict[str, str]) -> str | None:
    """The differences between the identities of a checkpoint and a run; `None` if there are none to compare."""
    if not found:
        return None
    different = [name for name in own if name in found and found[name] != own[name]]
    if not different:
        return None
    listed = ", ".join(f"`{name}` {found[name]} instead of {own[name]}" for name in different[:4])
    return f"it belongs to a different run: {listed}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
