"""
TRL 1.16: its private helpers that are used here, in one place, and how its trainers take a model family.

`tests/contract` compares the signatures of all private names with those of the pinned version.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.utils import (
    RepeatSampler,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    use_adapter,
)

__all__ = [
    "CausalLMInTRL",
    "FamilyInTRL",
    "ForwardRedirection",
    "RepeatSampler",
    "forget_patched_forward",
    "get_config_model_id",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "use_adapter",
]


class FamilyInTRL(Protocol):
    """What makes TRL and transformers, whose trainers know causal LMs alone, take another model family."""

    @staticmethod
    def processing_class(model: Any, given: Any, revision: str | None = None) -> Any:
        """The tokenizer to give to TRL, from a model or its name and what the user gave."""

    @staticmethod
    def patched() -> AbstractContextManager[None]:
        """Surrounds calls of TRL and transformers that know causal LMs alone."""

    @staticmethod
    def restore_special_tokens(generation_config: Any, model_config: Any) -> None:
        """Undoes in a generation config what TRL and transformers take from the tokenizer."""


class CausalLMInTRL:
    """TRL is made for causal LMs: there is nothing to work around."""

    @staticmethod
    def processing_class(model: Any, given: Any, revision: str | None = None) -> Any:
        """What was given; TRL loads the model's tokenizer where there is none."""
        return given

    @staticmethod
    def patched() -> AbstractContextManager[None]:
        """Nothing to patch."""
        return nullcontext()

    @staticmethod
    def restore_special_tokens(generation_config: Any, model_config: Any) -> None:
        """The tokenizer's are right."""


def forget_patched_forward(model: Any) -> None:
    """Removes the `forward` that TRL patches onto an instance: a copy's would still call the original model."""
    model.__dict__.pop("forward", None)
