"""Several processes: weights that are sharded over them (FSDP2, DeepSpeed ZeRO), and batches that are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, fsdp2_prepare_model, is_peft_model
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed

from trl_drcd.compat.family_hooks import forget_patched_forward
from trl_drcd.compat.torch_distributed import initialize_fsdp_root, reshards_after_forward
from trl_drcd.compat.trl_private import ForwardRedirection, maybe_gather_lm_head_ctx
from trl_drcd.heads import Head

logger = get_logger(__name__)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the model or its gradients are sharded over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


class InsideForward:
    """
    Calls a function inside the forward of a wrapped model, so that the wrapper's hooks gather its weights.

    Args:
        accelerator (`Accelerator`): The trainer's accelerator.
    """

    def __init__(self, accelerator: Accelerator):
        self.sharded_by_fsdp = accelerator.distributed_type == DistributedType.FSDP
        self.redirect = ForwardRedirection()

    def __call__(self, wrapper: Any, model: Any, function: Callable[[], Any]) -> Any:
        """Return the result of `function`; `wrapper` is the wrapped `model`, or `model` itself."""
        if not self.sharded_by_fsdp:
            return self.redirect(wrapper, model, function)
        kept: list[Any] = []

        def forward() -> Any:
            kept.append(function())
            return kept[0]

        # FSDP2 registers gradient hooks on the output of forward, but also casts it to bfloat16: return the original
        self.redirect(wrapper, model, forward)
        return kept[0]


def frozen_copy(model: Any, accelerator: Accelerator) -> Any:
    """
    A frozen copy of the initial model, sharded in the same way as the model itself.

    Without sharding, frozen parameters are shared with the model instead of copied.
    """
    frozen = [] if is_sharded(accelerator) else [p for p in model.parameters() if not p.requires_grad]
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]  # partitioned by ZeRO-3 during loading
    with DistributedBackend(accelerator).gather_params(partitioned):
        teacher = copy.deepcopy(model, memo={id(parameter): parameter for parameter in frozen})
    forget_patched_forward(teacher)
    return prepare_frozen(teacher, accelerator)


def prepare_frozen(teacher: Any, accelerator: Accelerator) -> Any:
    """Freeze a model, put it in evaluation mode, and shard or wrap it as the launch requires."""
    teacher.requires_grad_(False).eval()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Not TRL's `prepare_fsdp`: it wraps the whole model as one unit, reshards it before the loss uses the head,
        # and does not broadcast weights that `cpu_ram_efficient_loading` loads on one process only
        return shard(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def shard(model: Any, accelerator: Accelerator) -> Any:
    """
    Shard a model with FSDP2, as accelerate does when training starts.

    accelerate makes embeddings and head separate units. This fails if the head is a list, whose forward is never
    called (MusicGen), if the embeddings belong to a frozen module, or if the model names neither (Dia); both then stay
    in the root unit.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = own.get_output_embeddings()
    if head is not None and not isinstance(head, torch.nn.ModuleList):
        return fsdp2_prepare_model(accelerator, model)
    none = mock.Mock(return_value=None)
    with mock.patch.multiple(type(own), get_input_embeddings=none, get_output_embeddings=none):
        return fsdp2_prepare_model(accelerator, model)


def separate_teacher(student: Any, other: Any, accelerator: Accelerator, stays_whole: str | None) -> Any:
    """
    The teacher's weights where they are not the student's own, wrapped as the launch needs it.

    With FSDP2 a student with modules that must stay whole is sharded here as well, after it was copied.

    Args:
        student (`PreTrainedModel` or `PeftModel`): Unwrapped.
        other (`PreTrainedModel`, *optional*): A model that teaches in place of the initial one.
        accelerator (`Accelerator`): Of the launch.
        stays_whole (`str`, *optional*): Regular expression for the names of modules that are not sharded.

    Returns:
        The frozen copy of the student, or `other`; `None` if the base of the student's adapter teaches.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    apart = plugin is not None and stays_whole is not None
    if apart:
        plugin.ignored_modules = stays_whole
    if other is not None:
        teacher = prepare_frozen(other, accelerator)
    else:
        teacher = None if is_peft_model(student) else frozen_copy(student, accelerator)
    if apart:
        shard(student, accelerator)
    return teacher


def whole_heads(*heads: Head) -> AbstractContextManager[None]:
    """Under ZeRO-3, gather the weights of output heads that the loss uses directly; call it on all processes."""
    parameters: Any = [tensor for head in heads for tensor in (head.weight, head.bias)]
    return maybe_gather_lm_head_ctx(*parameters)


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """
    Gather the weights of an FSDP2 model once, for all forwards inside the context, which then do not communicate.

    Otherwise every sampled token would gather all weights again, and code that calls a submodule directly, such as
    MusicGen's sampling, would find sharded weights.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if modules:
        initialize_fsdp_root(model)
    resharding = [m for m in modules if reshards_after_forward(m)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module in resharding, recurse=False)
            module.reshard()


def count_completions(loader: Any, num_generations: int, batch: int, processes: int) -> None:
    """
    Let accelerate know how many completions an evaluation has, to drop those that only fill the last batch.

    It counts the rows of the data set, which TRL's sampler repeats.

    Args:
        loader (`DataLoader`): Of the evaluation.
        num_generations (`int`): Completions of each row.
        batch (`int`): Completions per batch of all processes.
        processes (`int`): Number of processes.
    """
    if not isinstance(loader.dataset, Dataset):
        return
    rows = len(loader.dataset) * num_generations
    loader.dataset.total_dataset_length = rows
    if rows % batch and processes > 1:
        logger.warning_once(
            f"{len(loader.dataset)} prompts of evaluation do not fill batches of {batch} sequences: the first "
            f"prompts fill up the last one, and count twice in TRL's metrics (rewards, lengths), not in ours."
        )
