"""Audio: codecs, embedders E, and the judges of evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_drcd.audio.clap import ClapJudge
    from trl_drcd.audio.codecs import CodebookCodec, SpectralCodec
    from trl_drcd.audio.dac import DelayedCodec
    from trl_drcd.audio.descriptors import MusicDescriptors
    from trl_drcd.audio.embedder import MusicEmbedder
    from trl_drcd.audio.judges import PreferenceModel, TextAudioJudge

__all__ = [
    "ClapJudge",
    "CodebookCodec",
    "DelayedCodec",
    "MusicDescriptors",
    "MusicEmbedder",
    "PreferenceModel",
    "SpectralCodec",
    "TextAudioJudge",
]

# Imported lazily: a codec does not need torchaudio
_MODULES = {
    "ClapJudge": "clap",
    "CodebookCodec": "codecs",
    "DelayedCodec": "dac",
    "MusicDescriptors": "descriptors",
    "MusicEmbedder": "embedder",
    "PreferenceModel": "judges",
    "SpectralCodec": "codecs",
    "TextAudioJudge": "judges",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
