"""Helpers for weights that are sharded over processes (FSDP2, DeepSpeed ZeRO)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed

from trl_drcd.compat.torch_distributed import initialize_fsdp_root, reshards_after_forward
from trl_drcd.compat.trl_private import ForwardRedirection, forget_patched_forward, maybe_gather_lm_head_ctx
from trl_drcd.heads import Head


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parts of the model, or of its gradients, lie on other processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


class InsideForward:
    """
    Calls a function inside the forward of a model as wrapped for several processes, whose hooks gather its weights.

    Args:
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(self, accelerator: Accelerator):
        self.sharded_by_fsdp = accelerator.distributed_type == DistributedType.FSDP
        self.redirect = ForwardRedirection()

    def __call__(self, wrapper: Any, model: Any, function: Callable[[], Any]) -> Any:
        """What `function` returns; `wrapper` is `model` as wrapped, or `model` itself."""
        if not self.sharded_by_fsdp:
            return self.redirect(wrapper, model, function)
        kept: list[Any] = []

        def forward() -> Any:
            kept.append(function())
            return kept[0]

        # FSDP2 looks for gradients at what a forward returns, but then rounds it to bfloat16: take what was before
        self.redirect(wrapper, model, forward)
        return kept[0]


def check_sharding(accelerator: Accelerator, updates_per_rollout: float, keeps_parts_whole: bool = False) -> None:
    """
    Refuses what gives no right result.

    FSDP 1 hides the head, with which the loss projects, in flat parameters; ZeRO-3 gives it up before the backward
    pass, which projects again where there are several updates per rollout, and has the codec of a MusicGen in pieces;
    accelerate broadcasts only what FSDP2 has in pieces.

    Args:
        accelerator (`Accelerator`): Of the launch.
        updates_per_rollout (`float`): Updates that one rollout serves.
        keeps_parts_whole (`bool`, *optional*): Whether the family has parts that are not sharded.

    Raises:
        ValueError: If the launch asks for one of these.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version={fsdp.fsdp_version}` is not supported; set `fsdp_version: 2` in the accelerate config "
            "(recipes/accelerate/fsdp2.yaml is one)"
        )
    if fsdp is not None and fsdp.cpu_ram_efficient_loading and keeps_parts_whole:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading=true` does not load the parts of this model that stay whole; set it to "
            "false in the accelerate config"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    if keeps_parts_whole:
        raise ValueError("`zero_stage=3` of DeepSpeed does not go with MusicGen; use FSDP2, ZeRO-2, or LoRA with DDP")
    if updates_per_rollout > 1:
        raise ValueError(
            f"{updates_per_rollout:g} updates per rollout do not go with DeepSpeed ZeRO-3; set `num_iterations=1` and "
            "leave out `steps_per_generation`, or use FSDP2 or ZeRO-2"
        )


def frozen_copy(model: Any, accelerator: Accelerator) -> Any:
    """
    A copy of the initial model that nothing trains, spread over the processes as the model itself will be.

    What is frozen in the model is shared with it, unless either is sharded.
    """
    frozen = [] if is_sharded(accelerator) else [p for p in model.parameters() if not p.requires_grad]
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]  # by ZeRO-3, while it was loaded
    with DistributedBackend(accelerator).gather_params(partitioned):
        teacher = copy.deepcopy(model, memo={id(parameter): parameter for parameter in frozen})
    forget_patched_forward(teacher)
    return prepare_frozen(teacher, accelerator)


def prepare_frozen(teacher: Any, accelerator: Accelerator) -> Any:
    """A model that nothing trains, frozen, in evaluation mode, and spread over the processes as the launch says."""
    teacher.requires_grad_(False).eval()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Not TRL's `prepare_fsdp`: that makes one unit of the whole model, frees it before the loss has projected, and
        # takes from the other processes the weights that `cpu_ram_efficient_loading` never loaded there
        return shard(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def shard(model: Any, accelerator: Accelerator) -> Any:
    """
    Spreads a model over the processes by FSDP2, as accelerate does when training starts.

    accelerate takes embeddings and head for units of their own, which is wrong where the head is a list, that nothing
    calls (MusicGen), or the embeddings are those of a frozen part: there both belong to the unit of the whole model.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(own.get_output_embeddings(), torch.nn.ModuleList):
        return fsdp2_prepare_model(accelerator, model)
    none = mock.Mock(return_value=None)
    with mock.patch.multiple(type(own), get_input_embeddings=none, get_output_embeddings=none):
        return fsdp2_prepare_model(accelerator, model)


def whole_heads(*heads: Head) -> AbstractContextManager[None]:
    """Gathers the weights of output heads that the loss itself projects with, under ZeRO-3; on all processes alike."""
    parameters: Any = [tensor for head in heads for tensor in (head.weight, head.bias)]
    return maybe_gather_lm_head_ctx(*parameters)


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """
    Gathers the weights of an FSDP2 model once for all forwards of the body, which then do not communicate.

    Without it each token that is sampled gathers all weights anew, and what calls a part of the model by itself, as
    MusicGen's sampling does, meets pieces.
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
