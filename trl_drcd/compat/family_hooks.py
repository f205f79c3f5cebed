"""
The hooks that adapt the trainers of TRL to a model family; TRL itself, which takes seconds to import, stays out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class FamilyInTRL(Protocol):
    """Hooks that let the TRL and transformers trainers, written for causal LMs, train another model family."""

    @staticmethod
    def processing_class(model: Any, given: object, revision: str | None = None) -> Any:
        """Return the tokenizer to pass to TRL, given a model or its name and the user's `processing_class`."""

    @staticmethod
    def patched() -> AbstractContextManager[None]:
        """Context for calls to TRL and transformers code that supports causal LMs only."""

    @staticmethod
    def restore_special_tokens(generation_config: Any, model_config: Any) -> None:
        """Undo the changes that TRL and transformers make to a generation config from the tokenizer's ids."""


class CausalLMInTRL:
    """Causal LMs, which TRL supports: every hook does nothing."""

    @staticmethod
    def processing_class(model: Any, given: object, revision: str | None = None) -> Any:
        """Return the argument unchanged; for `None`, TRL loads the model's tokenizer."""
        return given

    @staticmethod
    def patched() -> AbstractContextManager[None]:
        """Nothing to patch."""
        return nullcontext()

    @staticmethod
    def restore_special_tokens(generation_config: Any, model_config: Any) -> None:
        """Keep the tokenizer's ids, which are correct."""


def forget_patched_forward(model: Any) -> None:
    """Remove the `forward` that TRL patches onto an instance; in a copy it would still call the original model."""
    model.__dict__.pop("forward", None)
