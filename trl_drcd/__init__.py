"""
Diversity-rewarded CFG distillation (https://huggingface.co/papers/2410.06084) for TRL.

The public names are imported on first use, so that `import trl_drcd` costs no import of torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_drcd.compat.torchaudio_wheel import hide_unusable_torchaudio

if TYPE_CHECKING:
    from trl_drcd.config import CFGDistillDiversityConfig
    from trl_drcd.diversity import DiversityReward
    from trl_drcd.guidance import TeacherCFGLogitsProcessor
    from trl_drcd.trainer import CFGDistillDiversityTrainer

__version__ = "0.1.0"
__all__ = [
    "CFGDistillDiversityConfig",
    "CFGDistillDiversityTrainer",
    "DiversityReward",
    "TeacherCFGLogitsProcessor",
]

_MODULES = {
    "CFGDistillDiversityConfig": "config",
    "CFGDistillDiversityTrainer": "trainer",
    "DiversityReward": "diversity",
    "TeacherCFGLogitsProcessor": "guidance",
}

# Here, since every module below imports transformers, which imports torchaudio wherever it is installed
hide_unusable_torchaudio()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
