"""What weights that are spread over processes ask for (FSDP2, DeepSpeed ZeRO); nothing where each has them all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ._head import Head


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parts of the model, or of its gradients, lie on other processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_sharding(accelerator: Accelerator, updates_per_rollout: float) -> None:
    """
    Refuses what the loss cannot project with: FSDP 1 hides the head in flat parameters; ZeRO-3 gives it up before the
    backward pass, which projects again where there are several updates per rollout.

    Raises:
        ValueError: If the launch asks for it.
    """
    version = getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2)
    if version != 2:
        raise ValueError(
            f"`fsdp_version={version}` is not supported; set `fsdp_version: 2` in the accelerate config "
            "(recipes/accelerate/fsdp2.yaml is one)"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and updates_per_rollout > 1:
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
    # TRL patches `forward` on the instance, and the patch's closure still calls the student
    teacher.__dict__.pop("forward", None)
    teacher.requires_grad_(False).eval()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Not TRL's `prepare_fsdp`: that makes one unit of the whole model, frees it before the loss has projected, and
        # takes from the other processes the weights that `cpu_ram_efficient_loading` never loaded there
        return fsdp2_prepare_model(accelerator, teacher)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def usable_alone(module: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """A part of the model for use outside of the model's forward: under FSDP a copy, for its own is in pieces."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return module
    module = copy.deepcopy(module).to(accelerator.device)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = broadcast(tensor.data)  # only the first process may have loaded it
    return module


def whole_heads(*heads: Head) -> AbstractContextManager[None]:
    """Gathers the weights of output heads that the loss itself projects with, under ZeRO-3; on all processes alike."""
    parameters: Any = [tensor for head in heads for tensor in (head.weight, head.bias)]
    return maybe_gather_lm_head_ctx(*parameters)


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """
    Gathers the weights of an FSDP2 model once for all forwards of the body, which then do not communicate.

    Without it each token that is sampled gathers all weights, and processes whose completions end at different steps
    wait for each other forever.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if modules:
        model._get_fsdp_state()._lazy_init()  # the root's own must come before that of a part which runs alone
    resharding = [m for m in modules if _reshards(m)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module in resharding, recurse=False)
            module.reshard()


def _reshards(module: FSDPModule) -> bool:
    """Whether the weights are given up after each forward; all but the root's and the head's are."""
    groups: Any = module._get_fsdp_state()._fsdp_param_group
    return groups is not None and groups.post_forward_mesh_info is not None
