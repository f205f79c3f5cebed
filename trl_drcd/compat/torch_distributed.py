"""
torch 2.11 to 2.14: timeout and store of the default process group, and the internal state of FSDP2 modules.

torch has no public API to change the timeout of an existing group, to get its store, or to tell whether an FSDP2
module reshards its weights after the forward pass. `tests/contract` compares the signatures.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def set_group_timeout(seconds: float) -> None:
    """Set the timeout in seconds of collective operations in the default process group, if there is one."""
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def default_store() -> Any:
    """Return the key-value store of the default process group; `None` with MPI, which has no store."""
    return distributed_c10d._get_default_store()


def initialize_fsdp_root(model: Any) -> None:
    """Make `model` the FSDP2 root before one of its submodules runs on its own."""
    model._get_fsdp_state()._lazy_init()


def reshards_after_forward(module: FSDPModule) -> bool:
    """Whether an FSDP2 module reshards its weights after each forward; all but the root and the head do."""
    groups: Any = module._get_fsdp_state()._fsdp_param_group
    return groups is not None and groups.post_forward_mesh_info is not None
