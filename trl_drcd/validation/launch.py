"""Refuse what a launch cannot do: kinds of sharding, and what does not work with them."""

from __future__ import annotations

from accelerate import Accelerator

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import is_sharded


def check_launch(
    args: CFGDistillDiversityConfig, accelerator: Accelerator, reuses_rollouts: bool, keeps_parts_whole: bool
) -> None:
    """
    Refuse what a launch cannot do.

    Args:
        args ([`CFGDistillDiversityConfig`]): The trainer's arguments.
        accelerator (`Accelerator`): Of the launch.
        reuses_rollouts (`bool`): Whether an update lies between two batches of one rollout.
        keeps_parts_whole (`bool`): Whether the model family has modules that are not sharded.

    Raises:
        ValueError: If the launch shards in a way, or with a setting, that is not supported.
    """
    check_sharding(accelerator, reuses_rollouts, keeps_parts_whole)
    check_skipping(args, getattr(accelerator.state, "deepspeed_plugin", None) is not None)
    check_clipping(args.max_grad_norm_diversity, accelerator)
    if args.cache_implementation == "static" and is_sharded(accelerator):
        raise ValueError(
            "`cache_implementation=static` does not work with sharded weights, which a rollout gathers anew; leave it "
            "out"
        )


def check_sharding(accelerator: Accelerator, reuses_rollouts: bool, keeps_parts_whole: bool = False) -> None:
    """
    Raise an error for unsupported kinds of sharding.

    FSDP 1 stores the head, which the loss uses directly, in flat parameters. ZeRO-3 releases the head before the
    backward pass, which needs it with several updates per rollout, and shards the codec of a MusicGen. With
    `cpu_ram_efficient_loading`, accelerate broadcasts only the parameters that FSDP2 shards.

    Args:
        accelerator (`Accelerator`): The trainer's accelerator.
        reuses_rollouts (`bool`): Whether an update lies between two batches of one rollout.
        keeps_parts_whole (`bool`, *optional*): Whether the model family has modules that are not sharded.

    Raises:
        ValueError: If the launch uses one of these.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version={fsdp.fsdp_version}` is not supported; set `fsdp_version: 2` in the accelerate config "
            "(recipes/accelerate/fsdp2.yaml is one)"
        )
    if fsdp is not None and fsdp.cpu_ram_efficient_loading and keeps_parts_whole:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading=true` does not load the unsharded modules of this model; set it to false "
            "in the accelerate config"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    if keeps_parts_whole:
        raise ValueError("`zero_stage=3` of DeepSpeed does not work with MusicGen and Dia; use FSDP2, ZeRO-2, or DDP")
    if reuses_rollouts:
        raise ValueError(
            "several updates per rollout do not work with DeepSpeed ZeRO-3; set `num_iterations=1` and leave out "
            "`steps_per_generation`, or use FSDP2 or ZeRO-2"
        )


def check_skipping(args: CFGDistillDiversityConfig, deepspeed: bool) -> None:
    """Raise `ValueError` for `on_bad_batch="skip"` with DeepSpeed, whose optimizer step cannot be skipped."""
    if deepspeed and args.on_bad_batch == "skip":
        raise ValueError("`on_bad_batch='skip'` does not work with DeepSpeed, which runs its own updates; set 'stop'")


def check_clipping(max_norm: float | None, accelerator: Accelerator) -> None:
    """
    Refuse launches that shard gradients, which `torch.autograd.grad` does not gather.

    Raises:
        ValueError: If `max_norm` is given under FSDP or DeepSpeed.
    """
    if max_norm is not None and is_sharded(accelerator):
        raise ValueError(
            f"`max_grad_norm_diversity={max_norm}` does not go with {accelerator.distributed_type.value}, which "
            "spreads gradients over processes; leave it out, or use DDP (recipes/accelerate/ddp.yaml)"
        )
