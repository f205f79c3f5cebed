"""Text: the sentence embedder E, and the judges of evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.text.embedder import SentenceEmbedder
    from trl_drcd.text.reward_models import RewardModel

__all__ = ["RewardModel", "SentenceEmbedder"]

_MODULES = {"RewardModel": "reward_models", "SentenceEmbedder": "embedder"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
