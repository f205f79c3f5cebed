"""Judge of audio-text adherence from a CLAP checkpoint (https://huggingface.co/papers/2211.06687)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_drcd.audio.front_end import check_waveform
from trl_drcd.compat.extras import require


class ClapJudge:
    """
    Scores how well audio matches a caption with a CLAP model of transformers; same interface as [`TextAudioJudge`].

    Called with a list of clips it is an embedder, so it can also measure diversity. Clips longer than the model's
    window are handled by its feature extractor, which gets each clip alone: of several short ones it would read one as
    a long one. Some checkpoints crop at random with NumPy's global random state, which is seeded here for each clip
    and then restored. So a clip's embedding does not depend on the others.

    Args:
        model (`ClapModel`): The model in evaluation mode, on any device.
        processor (`ClapProcessor`): Its tokenizer and feature extractor.
        batch_size (`int`, *optional*, defaults to 16): Clips or captions per batch.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 16) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> ClapJudge:
        """Load from a folder or a Hub name, e.g. `"laion/larger_clap_music"`; weights from safetensors only."""
        from transformers import ClapModel, ClapProcessor

        model = ClapModel.from_pretrained(name_or_path, use_safetensors=True, **kwargs).eval()
        return cls(model, ClapProcessor.from_pretrained(name_or_path, **kwargs))

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings of captions, shape `(N, D)`, of unit norm, on the CPU."""
        parts = []
        for start in range(0, len(captions), self.batch_size):
            part = list(captions[start : start + self.batch_size])
            inputs = self.processor.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            parts.append(_normalised(self.model.get_text_features(**inputs.to(self.model.device))))
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    @torch.no_grad()
    def embed_audio(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """Embeddings of clips, shape `(N, D)`, of unit norm, on the CPU; raises as [`adherence`] does."""
        import numpy as np

        rate, parts = self.processor.feature_extractor.sampling_rate, []
        waveforms = [self._resampled(check_waveform(wave, r, i), int(r), rate) for i, (wave, r) in enumerate(audio)]
        state = np.random.get_state()  # noqa: NPY002
        try:
            for start in range(0, len(waveforms), self.batch_size):
                read = [self._features(waveform, rate) for waveform in waveforms[start : start + self.batch_size]]
                inputs = {name: torch.cat([each[name] for each in read]).to(self.model.device) for name in read[0]}
                parts.append(_normalised(self.model.get_audio_features(**inputs)))
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    __call__ = embed_audio

    def adherence(self, captions: Sequence[str], audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """
        Cosine similarity of the embeddings of each caption and its clip.

        Args:
            captions (`list[str]`): Length N.
            audio (`list` of `(waveform, sampling_rate)`): Length N; waveforms 1-D, floating point, of any length.

        Returns:
            `torch.Tensor`: Shape `(N,)`, in `[-1, 1]`, no unit, on the CPU.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If the lengths differ, a waveform is not 1-D or not finite, or a rate is not a positive
                integer.
        """
        if len(captions) != len(audio):
            raise ValueError(f"expected one caption per clip, got {len(captions)} `captions` and {len(audio)} clips")
        return (self.embed_text(captions) * self.embed_audio(audio)).sum(-1)

    def _features(self, waveform: torch.Tensor, rate: int) -> dict[str, torch.Tensor]:
        """What the model reads of a clip, a batch of one."""
        import numpy as np

        extractor = self.processor.feature_extractor
        np.random.seed(0)  # noqa: NPY002
        features = dict(extractor(waveform.numpy(), sampling_rate=rate, return_tensors="pt"))
        if extractor.truncation == "fusion":  # which says it of one short clip of each call, where none is longer
            frames, window = (samples // extractor.hop_length for samples in (len(waveform), extractor.nb_max_samples))
            features["is_longer"] = torch.full_like(torch.as_tensor(features["is_longer"]), frames > window)
        return features

    @staticmethod
    def _resampled(waveform: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
        if not waveform.numel():
            return torch.zeros(wanted // 10)  # 0.1 s of silence for an empty clip
        return (
            waveform if rate == wanted else require("torchaudio.functional", "audio").resample(waveform, rate, wanted)
        )


def _normalised(features: Any) -> torch.Tensor:
    """Rows of unit norm, float32 on the CPU; transformers returns a tensor or an output object that holds it."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1).cpu()
