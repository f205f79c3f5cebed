"""
Models that judge music, for evaluation only: never used as rewards, and trained separately from the embedder E.

Text adherence is measured as in the paper with MuLan (https://huggingface.co/papers/2208.12415): the cosine
similarity of an audio tower and a text tower, trained contrastively.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trl_drcd.audio.front_end import LogMel, SavedModule, audio_windows


class AudioTower(SavedModule):
    """
    A convolutional network over log-mel windows of `window` samples, averaged over time.

    Longer audio is split into windows and averaged over all of them; shorter audio is padded with silence that is
    excluded from the average. Features do not depend on loudness.

    Args:
        sampling_rate (`int`): Sampling rate of the model's input, Hz.
        n_fft, hop_length, n_mels (`int`): Window and hop of the mel spectrogram in samples, and number of bands.
        window (`int`): Samples per window.
        channels (`list[int]`): Channels of the convolutions, each of which halves time and frequency.
        feature_size (`int`): Width of the features.
        mel_mean, mel_std (`float`): Mean and standard deviation of the log-mel in the training data, nats.

    Raises:
        ImportError: If torchaudio is not installed (extra `audio`).
    """

    def __init__(
        self,
        sampling_rate: int,
        n_fft: int,
        hop_length: int,
        n_mels: int,
        window: int,
        channels: Sequence[int],
        feature_size: int,
        mel_mean: float,
        mel_std: float,
    ) -> None:
        super().__init__()
        self.sampling_rate, self.window, self.feature_size = sampling_rate, window, feature_size
        self.frames_per_position = 2 ** len(channels)
        self.log_mel = LogMel(sampling_rate, n_fft, hop_length, n_mels, mel_mean, mel_std)
        layers: list[nn.Module] = []
        for before, after in zip([1, *channels], channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        bands = -(-n_mels // self.frames_per_position)
        self.features = nn.Sequential(nn.Linear(channels[-1] * bands, feature_size), nn.GELU())

    def audio_features(self, frames: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """
        Features of windows, averaged over time; differentiable.

        Args:
            frames (`torch.Tensor`): Log-mel windows, shape `(W, F, n_mels)`.
            num_frames (`torch.Tensor`): Frames of each window that are not padding, shape `(W,)`, at least 1.

        Returns:
            `torch.Tensor`: Shape `(W, feature_size)`, float32.
        """
        maps = self.convolutions(frames[:, None]).permute(0, 2, 1, 3).flatten(2)  # (W, positions, channels * bands)
        count = -(-num_frames // self.frames_per_position)
        beyond = torch.arange(maps.shape[1], device=maps.device) >= count[:, None]
        features = self.features(maps).float().masked_fill(beyond[..., None], 0.0)
        return features.sum(1) / count[:, None]

    @torch.no_grad()
    def listen(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """
        Features of clips, shape `(len(audio), feature_size)`, on the model's device.

        Args:
            audio (`list` of `(waveform, sampling_rate)`): Waveforms 1-D, floating point, of any length; rates in Hz.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If a waveform is not 1-D or not finite, or a rate is not a positive integer.
        """
        windows, lengths, owners = audio_windows(audio, self.sampling_rate, self.window)
        num_frames = (-(-lengths // self.log_mel.hop_length)).clamp(max=self.window // self.log_mel.hop_length)
        device = next(self.parameters()).device
        sums = torch.zeros(len(audio), self.feature_size)
        for start in range(0, len(windows), 16):  # small enough for the cache
            part = slice(start, start + 16)
            features = self.audio_features(self.log_mel(windows[part].to(device)), num_frames[part].to(device)).cpu()
            sums.index_add_(0, owners[part], features * num_frames[part, None])
        frames_of_clip = torch.zeros(len(audio)).index_add_(0, owners, num_frames.float())
        return (sums / frames_of_clip[:, None]).to(device)


class TextAudioJudge(AudioTower):
    """
    Scores how well audio matches a caption, and classifies audio by known attributes.

    The audio tower is [`AudioTower`]. The text tower embeds lower-cased words, applies one convolution of width 3, and
    averages over words; words outside `vocabulary` share one embedding.

    Args:
        vocabulary (`list[str]`): Words known to the text tower, in lower case.
        labels (`dict[str, list[str]]`): Attribute to its possible labels, for `classify`.
        text_size, embedding_size (`int`): Widths of word embeddings and of the joint space.
        sampling_rate, n_fft, hop_length, n_mels, window, channels, feature_size, mel_mean, mel_std: See
            [`AudioTower`].

    Raises:
        ImportError: If torchaudio is not installed (extra `audio`).
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        labels: dict[str, list[str]],
        sampling_rate: int = 16000,
        n_fft: int = 2048,
        hop_length: int = 512,
        n_mels: int = 80,
        window: int = 64000,
        channels: Sequence[int] = (32, 64, 96, 128),
        text_size: int = 64,
        feature_size: int = 256,
        embedding_size: int = 128,
        mel_mean: float = 0.0,
        mel_std: float = 1.0,
    ) -> None:
        super().__init__(sampling_rate, n_fft, hop_length, n_mels, window, channels, feature_size, mel_mean, mel_std)
        self.labels = labels
        self.word_ids = {word: index + 2 for index, word in enumerate(vocabulary)}  # 0 pads, 1 is any other word
        self.audio_projection = nn.Linear(feature_size, embedding_size)
        self.heads = nn.ModuleDict({name: nn.Linear(feature_size, len(values)) for name, values in labels.items()})
        self.words = nn.Embedding(len(vocabulary) + 2, text_size, padding_idx=0)
        self.phrases = nn.Conv1d(text_size, feature_size, 3, padding=1)
        self.text_projection = nn.Linear(feature_size, embedding_size)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # log of the inverse temperature of the contrastive loss

    def word_tensor(self, captions: Sequence[str]) -> torch.Tensor:
        """Word ids of captions, shape `(N, L)`, padded with 0; a caption without words becomes one unknown word."""
        words = [re.findall(r"[\w#']+", caption.lower()) for caption in captions]
        rows = [[self.word_ids.get(word, 1) for word in line] or [1] for line in words]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    def text_embeddings(self, word_ids: torch.Tensor) -> torch.Tensor:
        """Word ids `(N, L)` to embeddings `(N, embedding_size)` of unit norm; differentiable."""
        present = (word_ids != 0)[..., None]
        phrases = nn.functional.gelu(self.phrases(self.words(word_ids).transpose(1, 2))).transpose(1, 2)
        mean = (phrases.float() * present).sum(1) / present.sum(1)
        return nn.functional.normalize(self.text_projection(mean).float(), dim=-1)

    def audio_embeddings(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, feature_size)` to embeddings `(N, embedding_size)` of unit norm; differentiable."""
        return nn.functional.normalize(self.audio_projection(features).float(), dim=-1)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings of captions, shape `(N, embedding_size)`, of unit norm, on the CPU."""
        if not len(captions):
            return torch.zeros(0, self.text_projection.out_features)
        return self.text_embeddings(self.word_tensor(captions).to(self.log_scale.device)).cpu()

    @torch.no_grad()
    def embed_audio(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """Embeddings of clips, shape `(N, embedding_size)`, of unit norm, on the CPU; raises as `adherence` does."""
        return self.audio_embeddings(self.listen(audio)).cpu()

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

    @torch.no_grad()
    def classify(self, audio: Sequence[tuple[Any, int]]) -> dict[str, list[str]]:
        """
        The most likely label of each clip, for each attribute.

        Args:
            audio (`list` of `(waveform, sampling_rate)`): Length N; waveforms 1-D, floating point, of any length.

        Returns:
            `dict[str, list[str]]`: For each attribute in `labels`, N labels.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If a waveform is not 1-D or not finite, or a rate is not a positive integer.
        """
        features = self.listen(audio)
        return {
            name: [self.labels[name][index] for index in head(features).argmax(-1).tolist()]
            for name, head in self.heads.items()
        }


class PreferenceModel(AudioTower):
    """
    Scores the acoustic quality of audio, independent of its prompt: a proxy for a score learned from listeners.

    A Bradley-Terry model, `P(a preferred to b) = sigmoid(score(a) - score(b))`, trained on pairs whose better side is
    known by construction (a recording and a degraded copy of it, a recording and a generated clip). Its training data
    contain no ratings by listeners, and no comparisons of samples with and without guidance.

    Args:
        sampling_rate, n_fft, hop_length, n_mels, window, channels, feature_size, mel_mean, mel_std: See
            [`AudioTower`].

    Raises:
        ImportError: If torchaudio is not installed (extra `audio`).
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 400,
        n_mels: int = 64,
        window: int = 64000,
        channels: Sequence[int] = (32, 48, 64),
        feature_size: int = 96,
        mel_mean: float = 0.0,
        mel_std: float = 1.0,
    ) -> None:
        super().__init__(sampling_rate, n_fft, hop_length, n_mels, window, channels, feature_size, mel_mean, mel_std)
        self.head = nn.Linear(feature_size, 1)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, feature_size)` to scores `(N,)`, nats (log-odds); differentiable."""
        return self.head(features).squeeze(-1).float()

    @torch.no_grad()
    def preference(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """
        Scores of clips; the difference of two is the log-odds, in nats, that the first is preferred.

        Args:
            audio (`list` of `(waveform, sampling_rate)`): Waveforms 1-D, floating point, of any length; rates in Hz.

        Returns:
            `torch.Tensor`: Shape `(len(audio),)`, nats, on the CPU.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If a waveform is not 1-D or not finite, or a rate is not a positive integer.
        """
        return self.scores(self.listen(audio)).cpu()


def bradley_terry_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss: mean of `-log sigmoid(better - worse)`, nats, of the scores of pairs, each `(N,)`."""
    return -nn.functional.logsigmoid(better - worse).mean()
