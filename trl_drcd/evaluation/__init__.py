"""What is measured after training; none of it is ever a reward."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.evaluation.judges import TextAudioJudge

__all__ = ["TextAudioJudge"]


def __getattr__(name: str) -> Any:
    if name == "TextAudioJudge":
        from trl_drcd.evaluation.judges import TextAudioJudge

        return TextAudioJudge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
