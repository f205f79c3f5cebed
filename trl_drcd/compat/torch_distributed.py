"""
torch 2.11 to 2.14: timeouts and the store of the default process group, and the insides of FSDP2 modules.

torch has no public way to change the timeout of a group that exists, to reach its store, or to ask whether an FSDP2
module gives up its weights after the forward pass. `tests/contract` compares the signatures.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule


def set_group_timeout(seconds: float) -> None:
    """How long a process waits for the others in an exchange, where a process group exists."""
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def default_store() -> Any:
    """The key-value store of the default process group; `None` with MPI, which has none."""
    return distributed_c10d._get_default_store()


def initialize_fsdp_root(model: Any) -> None:
    """Makes `model` the FSDP2 root before a part of it runs alone."""
    model._get_fsdp_state()._lazy_init()


def reshards_after_forward(module: FSDPModule) -> bool:
    """Whether an FSDP2 module gives up its weights after each forward; all but the root's and the head's do."""
    groups: Any = module._get_fsdp_state()._fsdp_param_group
    return groups is not None and groups.post_forward_mesh_info is not None
