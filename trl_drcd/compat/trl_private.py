"""
TRL 1.16: the private helpers used in this package.

`tests/contract` compares the signatures of all private names with those of the pinned version.
"""

from __future__ import annotations

from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.utils import (
    RepeatSampler,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    use_adapter,
)

__all__ = [
    "ForwardRedirection",
    "RepeatSampler",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "use_adapter",
]
