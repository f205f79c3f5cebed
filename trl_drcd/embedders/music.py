"""The music embedding model E: log-mel, a small vision transformer, a mean over time (Appendix C.1 of the paper)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trl_drcd.embedders.audio_front_end import LogMel, SavedModule, audio_windows


class MusicEmbedder(SavedModule):
    """
    Embeds audio so that chunks of one recording lie close, after Appendix C.1 of
    https://huggingface.co/papers/2410.06084.

    A vision transformer reads patches of `patch_frames` frames by all mel bands, in windows of `num_patches *
    patch_frames * hop_length` samples (4 s by default). The mean of its outputs over all patches of a clip, projected
    to `embedding_size` and scaled to length 1, is the embedding. Audio of other rates is resampled. A longer clip is
    read in windows, and the mean runs over all of them; a shorter one is filled up with silence that no patch attends
    to, so other items of the list change nothing. Loudness does not count. Silence, and audio without samples, is
    embedded like any other sound, so two silent clips are equal.

    The defaults are the small model that the project ships. The paper's has 156 bands, n_fft 512, hop 256, 12 layers
    of width 512 and feed-forward layers of 1024.

    Args:
        sampling_rate (`int`): What the model hears, in Hz.
        n_fft, hop_length, n_mels (`int`): Of the mel spectrogram; samples, samples, bands.
        patch_frames (`int`): Frames per patch.
        num_patches (`int`): Patches per window.
        hidden_size, num_layers, num_heads, feed_forward_size (`int`): Of the transformer.
        embedding_size (`int`): D.
        mel_mean, mel_std (`float`): Of the log-mel in the training data, in nats.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `num_heads`.
        ImportError: If torchaudio is missing; it comes with the extra `audio`.
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 2048,
        hop_length: int = 500,
        n_mels: int = 96,
        patch_frames: int = 8,
        num_patches: int = 16,
        hidden_size: int = 160,
        num_layers: int = 4,
        num_heads: int = 5,
        feed_forward_size: int = 320,
        embedding_size: int = 192,
        mel_mean: float = 0.0,
        mel_std: float = 1.0,
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.sampling_rate, self.patch_frames, self.embedding_size = sampling_rate, patch_frames, embedding_size
        self.window = num_patches * patch_frames * hop_length
        self.log_mel = LogMel(sampling_rate, n_fft, hop_length, n_mels, mel_mean, mel_std)
        self.patch_projection = nn.Linear(patch_frames * n_mels, hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(num_patches, hidden_size))
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, feed_forward_size, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(hidden_size), enable_nested_tensor=False)
        self.projection = nn.Linear(hidden_size, embedding_size)

    def encode(self, frames: torch.Tensor, num_patches: torch.Tensor) -> torch.Tensor:
        """
        Sums over time of the transformer's outputs; differentiable.

        Args:
            frames (`torch.Tensor`): Log-mel windows, shape `(W, num_patches * patch_frames, n_mels)`.
            num_patches (`torch.Tensor`): Patches of each window that count, shape `(W,)`, at least 1.

        Returns:
            `torch.Tensor`: Shape `(W, hidden_size)`.
        """
        patches = frames.reshape(frames.shape[0], len(self.positions), -1)
        beyond = torch.arange(len(self.positions), device=frames.device) >= num_patches[:, None]
        hidden = self.encoder(self.patch_projection(patches) + self.positions, src_key_padding_mask=beyond)
        return hidden.masked_fill(beyond[..., None], 0.0).sum(1)

    def project(self, means: torch.Tensor) -> torch.Tensor:
        """Means over time `(N, hidden_size)` to embeddings `(N, embedding_size)` of length 1; differentiable."""
        return nn.functional.normalize(self.projection(means).float(), dim=-1)

    @torch.no_grad()
    def forward(self, audio: Sequence[tuple[Any, int]]) -> torch.Tensor:
        """
        Embed a list of clips.

        Args:
            audio (`list` of `(waveform, sampling_rate)`): Waveforms 1-D, floating point, of any length; rates in Hz.

        Returns:
            `torch.Tensor`: Shape `(len(audio), embedding_size)`, float32, on the CPU, each row of length 1.

        Raises:
            TypeError: If samples are not floating-point numbers.
            ValueError: If a waveform is not 1-D or not finite, or a rate is not a positive whole number.
        """
        windows, lengths, owners = audio_windows(audio, self.sampling_rate, self.window)
        num_patches = -(-lengths // (self.log_mel.hop_length * self.patch_frames))
        device = self.positions.device
        sums = torch.zeros(len(audio), self.positions.shape[1], device=device)
        for start in range(0, len(windows), 16):  # small enough for the cache: twice as fast as all at once
            part = slice(start, start + 16)
            encoded = self.encode(self.log_mel(windows[part].to(device)), num_patches[part].to(device))
            sums.index_add_(0, owners[part].to(device), encoded.float())
        patches = torch.zeros(len(audio)).index_add_(0, owners, num_patches.float())
        return self.project(sums / patches[:, None].to(device)).cpu()
