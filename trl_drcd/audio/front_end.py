"""Audio front end, from a list of waveforms to log-mel windows; and modules saved as safetensors and JSON."""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors.torch import save_file
from torch import nn

from trl_drcd.compat.extras import require
from trl_drcd.files import open_to_readers
from trl_drcd.validation.saved_files import arguments_of, load_state, open_safetensors, read_json

MINIMUM_RMS = 1e-3  # limits the gain of quiet audio to 60 dB, so that silence stays silent
MEL_FLOOR = 1e-3  # added to the mel power of audio of unit RMS before the logarithm


def check_waveform(waveform: Any, sampling_rate: Any, index: int) -> torch.Tensor:
    """
    Check a waveform and return it as float32 on the CPU.

    Args:
        waveform (`torch.Tensor` or array): Shape `(T,)`, floating point; `T` may be 0.
        sampling_rate (`int`): Sampling rate, Hz.
        index (`int`): Position in the caller's list, for messages.

    Raises:
        TypeError: If the samples are not floating-point numbers, or the rate is not a number.
        ValueError: If the waveform is not 1-D (average the channels of stereo first) or has NaN or infinite samples,
            or the sampling rate is not a positive integer.
    """
    try:
        waveform = torch.as_tensor(waveform)
    except (TypeError, ValueError) as error:
        kind = type(waveform).__name__
        raise TypeError(f"audio[{index}] has samples of type {kind}; expected floats in [-1, 1]") from error
    if not waveform.is_floating_point():
        raise TypeError(f"audio[{index}] has samples of type {waveform.dtype}; expected floats in [-1, 1]")
    if waveform.ndim != 1:
        raise ValueError(
            f"audio[{index}] has shape {tuple(waveform.shape)}; expected one channel, shape (T,): average the channels"
        )
    if not isinstance(sampling_rate, int | float | np.number):
        raise TypeError(f"audio[{index}] has sampling rate {sampling_rate!r}; expected a positive integer in Hz")
    if not sampling_rate > 0 or not float(sampling_rate).is_integer():
        raise ValueError(f"audio[{index}] has sampling rate {sampling_rate}; expected a positive integer in Hz")
    waveform = waveform.detach().to("cpu", torch.float32)
    if not torch.isfinite(waveform).all():
        raise ValueError(f"audio[{index}] has NaN or infinite samples; expected finite samples")
    return waveform


def resampled_waveform(waveform: Any, rate: Any, index: int, sampling_rate: int) -> torch.Tensor:
    """
    Check a clip and resample it to `sampling_rate`.

    Args:
        waveform, rate, index: As in [`check_waveform`].
        sampling_rate (`int`): Sampling rate of the result, Hz.

    Returns:
        `torch.Tensor`: Shape `(T',)`, float32, on the CPU; empty if the clip is empty.

    Raises:
        TypeError, ValueError: See [`check_waveform`].
    """
    waveform = check_waveform(waveform, rate, index)
    if rate != sampling_rate and waveform.numel():
        waveform = require("torchaudio.functional", "audio").resample(waveform, int(rate), sampling_rate)
    return waveform


def clean_waveform(waveform: Any, rate: Any, index: int, sampling_rate: int) -> torch.Tensor:
    """
    [`resampled_waveform`], normalised to an RMS of 1 with a gain of at most 60 dB, so that silence stays silent.
    """
    waveform = resampled_waveform(waveform, rate, index, sampling_rate)
    if not waveform.numel():
        return waveform
    return waveform / waveform.square().mean().sqrt().clamp(min=MINIMUM_RMS)


def audio_windows(
    audio: Sequence[tuple[Any, int]], sampling_rate: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Split audio of any length and rate into windows of the same length, rate and loudness.

    Each clip is resampled, normalised as in [`clean_waveform`], split every `window` samples, and its last window
    padded with zeros. A clip without samples gives one window of silence.

    Args:
        audio (`list` of `(waveform, sampling_rate)`): As for `check_waveform`.
        sampling_rate (`int`): Sampling rate of the windows, Hz.
        window (`int`): Samples per window.

    Returns:
        `tuple` of `torch.Tensor`: Windows `(W, window)`; number of samples of each that are not padding `(W,)`, at
        least 1; index of the clip of each `(W,)`, ascending.

    Raises:
        TypeError, ValueError: See `check_waveform`.
    """
    windows, lengths, owners = [], [], []
    for index, (waveform, rate) in enumerate(audio):
        waveform = clean_waveform(waveform, rate, index, sampling_rate)
        count = max(1, -(-waveform.numel() // window))
        windows.append(nn.functional.pad(waveform, (0, count * window - waveform.numel())).view(count, window))
        lengths += [window] * (count - 1) + [max(1, waveform.numel() - (count - 1) * window)]
        owners += [index] * count
    if not windows:
        return torch.zeros(0, window), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return torch.cat(windows), torch.tensor(lengths), torch.tensor(owners)


class LogMel(nn.Module):
    """
    Standardised log-mel spectrogram, `(log(mel power + 1e-3) - mean) / std`; its filters are computed, not saved.

    Args:
        sampling_rate (`int`): Sampling rate, Hz.
        n_fft (`int`): Length of the Hann window, samples.
        hop_length (`int`): Samples between frames.
        n_mels (`int`): Number of mel bands.
        mean (`float`): Mean of the log-mel, nats.
        std (`float`): Standard deviation of the log-mel, nats.

    Raises:
        ImportError: If torchaudio is not installed (extra `audio`).
    """

    def __init__(self, sampling_rate: int, n_fft: int, hop_length: int, n_mels: int, mean: float, std: float) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.mean, self.std = n_fft, hop_length, mean, std
        functional = require("torchaudio.functional", "audio")
        filters = functional.melscale_fbanks(n_fft // 2 + 1, 0.0, sampling_rate / 2, n_mels, sampling_rate)
        window = torch.hann_window(n_fft)
        self.window: torch.Tensor
        self.filters: torch.Tensor
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Waveforms `(W, window)` of unit RMS to frames `(W, window / hop_length, n_mels)`."""
        # Pad with zeros, not by reflection: then zero padding of a window does not change its frames.
        spectrum = torch.stft(
            windows, self.n_fft, self.hop_length, window=self.window, pad_mode="constant", return_complex=True
        )[..., : windows.shape[-1] // self.hop_length]
        power = spectrum.real.square() + spectrum.imag.square()
        return (torch.log(power.transpose(1, 2) @ self.filters + MEL_FLOOR) - self.mean) / self.std


class SavedModule(nn.Module, ModelHubMixin, library_name="trl-drcd", repo_url=None, tags=["trl-drcd", "audio"]):
    """
    A module saved to a folder or a Hub repository: constructor arguments in `config.json`, weights in
    `model.safetensors`. `push_to_hub` is inherited from huggingface_hub.
    """

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return dict(self._hub_mixin_config)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """
        Write the folder, each file atomically; existing files are replaced except the model card.

        Args:
            save_directory (`str` or `Path`): Output folder, created if it does not exist.
            **kwargs: Passed to `huggingface_hub.ModelHubMixin.save_pretrained`, e.g. `push_to_hub` and `repo_id`.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            if (directory / "README.md").exists():
                shutil.copy(directory / "README.md", temporary)
            kwargs = {"repo_id": directory.name} | kwargs if kwargs.get("push_to_hub") else kwargs
            result = super().save_pretrained(temporary, **kwargs)
            open_to_readers(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, directory / file.name)
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors")
        config = {"model_class": type(self).__name__, **self.config}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """A model card with the class's docstring and an example of loading the model."""
        name, module = type(self).__name__, type(self).__module__.rpartition(".")[0]
        about = (inspect.getdoc(type(self)) or "").partition("\n\nArgs:")[0]
        usage = f"from {module} import {name}\n\nmodel = {name}.from_pretrained(...)  # this folder or repository"
        header = self._hub_mixin_info.model_card_data.to_yaml()
        return ModelCard(f"---\n{header}\n---\n\n# {name}\n\n{about}\n\n```python\n{usage}\n```\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        Load a folder written by `save_pretrained`, or a Hub repository; in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub name.
            **kwargs: Passed to `huggingface_hub.ModelHubMixin.from_pretrained`, e.g. `revision`.

        Raises:
            FileNotFoundError: If a folder lacks a file.
            ValueError: If it holds another class, or a file is broken.
        """
        directory = Path(pretrained_model_name_or_path)
        # Only a relative path of two parts that does not exist can be a Hub name
        if directory.exists() or directory.is_absolute() or len(directory.parts) != 2:
            if not (directory / "config.json").is_file():
                raise FileNotFoundError(
                    f"{directory} has no config.json; expected a folder written by `save_pretrained`"
                )
            read_json(directory / "config.json")
            open_safetensors(directory / "model.safetensors")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: Any, force_download: bool, local_files_only: bool,
        token: Any, **model_kwargs: Any,
    ) -> Self:  # fmt: skip
        def path(name: str) -> str:
            if os.path.isdir(model_id):
                return os.path.join(model_id, name)
            return hf_hub_download(
                model_id, name, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
            )  # fmt: skip

        config = read_json(path("config.json"))
        if (found := config.pop("model_class", None)) != cls.__name__:
            raise ValueError(f"{model_id} holds a {found}; expected a {cls.__name__}")
        model = cls(**arguments_of(cls, config | model_kwargs, path("config.json")))
        load_state(model, Path(path("model.safetensors")))
        return model.eval()
