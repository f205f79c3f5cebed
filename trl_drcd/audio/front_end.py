"""From a list of waveforms to log-mel windows, and models that are a folder of safetensors and JSON."""

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
from trl_drcd.validation.saved_files import arguments_of, load_state, open_safetensors, read_json

MINIMUM_RMS = 1e-3  # quieter audio is not amplified any further, so that silence stays silence
MEL_FLOOR = 1e-3  # added to the mel power of audio of unit RMS before the logarithm


def check_waveform(waveform: Any, sampling_rate: Any, index: int) -> torch.Tensor:
    """
    Checked float32 copy of one waveform, on the CPU.

    Args:
        waveform (`torch.Tensor` or array): Shape `(T,)`, floating point; `T` may be 0.
        sampling_rate (`int`): In Hz.
        index (`int`): Position in the caller's list, for the messages.

    Raises:
        TypeError: If the samples are not floating-point numbers, or the rate is no number.
        ValueError: If the waveform is not 1-D (average the channels of stereo first), holds NaN or infinity, or the
            sampling rate is not a positive whole number.
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
        raise TypeError(f"audio[{index}] has sampling rate {sampling_rate!r}; expected a positive whole number of Hz")
    if not sampling_rate > 0 or not float(sampling_rate).is_integer():
        raise ValueError(f"audio[{index}] has sampling rate {sampling_rate}; expected a positive whole number of Hz")
    waveform = waveform.detach().to("cpu", torch.float32)
    if not torch.isfinite(waveform).all():
        raise ValueError(f"audio[{index}] holds NaN or infinite samples; expected finite ones")
    return waveform


def resampled_waveform(waveform: Any, rate: Any, index: int, sampling_rate: int) -> torch.Tensor:
    """
    One clip at another rate.

    Args:
        waveform, rate, index: As in [`check_waveform`].
        sampling_rate (`int`): Wanted, in Hz.

    Returns:
        `torch.Tensor`: Shape `(T',)`, float32, on the CPU; empty if the clip is.

    Raises:
        TypeError, ValueError: See [`check_waveform`].
    """
    waveform = check_waveform(waveform, rate, index)
    if rate != sampling_rate and waveform.numel():
        waveform = require("torchaudio.functional", "audio").resample(waveform, int(rate), sampling_rate)
    return waveform


def clean_waveform(waveform: Any, rate: Any, index: int, sampling_rate: int) -> torch.Tensor:
    """
    [`resampled_waveform`] at one loudness: an RMS of 1, but for what is quieter than -60 dB (silence stays silence).
    """
    waveform = resampled_waveform(waveform, rate, index, sampling_rate)
    if not waveform.numel():
        return waveform
    return waveform / waveform.square().mean().sqrt().clamp(min=MINIMUM_RMS)


def audio_windows(
    audio: Sequence[tuple[Any, int]], sampling_rate: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cut audio of any length and rate into windows of one length and rate, at one loudness.

    Each clip is resampled, scaled to an RMS of 1 (so loudness carries no information; at most by 60 dB, so silence
    stays silence), cut every `window` samples, and the last piece filled up with zeros. A clip without samples gives
    one window of silence.

    Args:
        audio (`list` of `(waveform, sampling_rate)`): As `check_waveform` wants them.
        sampling_rate (`int`): Of the windows, in Hz.
        window (`int`): Samples per window.

    Returns:
        `tuple` of `torch.Tensor`: windows `(W, window)`; samples of each that came from the clip `(W,)`, at least 1;
        index of the clip each belongs to `(W,)`, ascending.

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
    `log(mel power + 1e-3)`, standardised with two fixed numbers; its filters are computed, never stored.

    Args:
        sampling_rate (`int`): In Hz.
        n_fft (`int`): Samples of the Hann window.
        hop_length (`int`): Samples between frames.
        n_mels (`int`): Bands.
        mean (`float`): Taken from the log-mel; nats.
        std (`float`): What is left is divided by it; nats.
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
        # Zeros and not reflections beyond the edges: what is computed then does not depend on the padding.
        spectrum = torch.stft(
            windows, self.n_fft, self.hop_length, window=self.window, pad_mode="constant", return_complex=True
        )[..., : windows.shape[-1] // self.hop_length]
        power = spectrum.real.square() + spectrum.imag.square()
        return (torch.log(power.transpose(1, 2) @ self.filters + MEL_FLOOR) - self.mean) / self.std


class SavedModule(nn.Module, ModelHubMixin, library_name="trl-drcd", repo_url=None, tags=["trl-drcd", "audio"]):
    """
    A module that is a folder or a repository of the hub: the arguments of its constructor in `config.json`, weights in
    `model.safetensors`. `push_to_hub` is huggingface_hub's.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return dict(self._hub_mixin_config)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """
        Write the folder, each file in one piece; existing files are replaced, but for the model card.

        Args:
            save_directory (`str` or `Path`): Made if it does not exist.
            **kwargs: Of `huggingface_hub.ModelHubMixin.save_pretrained`, e.g. `push_to_hub` and `repo_id`.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            if (directory / "README.md").exists():
                shutil.copy(directory / "README.md", temporary)
            kwargs = {"repo_id": directory.name} | kwargs if kwargs.get("push_to_hub") else kwargs
            result = super().save_pretrained(temporary, **kwargs)
            for file in Path(temporary).iterdir():
                os.replace(file, directory / file.name)
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors")
        config = {"model_class": type(self).__name__, **self.config}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card with what the class says of itself, and how to load the model."""
        name, module = type(self).__name__, type(self).__module__.rpartition(".")[0]
        about = (inspect.getdoc(type(self)) or "").partition("\n\nArgs:")[0]
        usage = f"from {module} import {name}\n\nmodel = {name}.from_pretrained(...)  # this folder or repository"
        header = self._hub_mixin_info.model_card_data.to_yaml()
        return ModelCard(f"---\n{header}\n---\n\n# {name}\n\n{about}\n\n```python\n{usage}\n```\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        Read a folder that `save_pretrained` wrote, or a repository of the hub; the model comes in evaluation mode, on
        the CPU.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder, or name on the hub.
            **kwargs: Of `huggingface_hub.ModelHubMixin.from_pretrained`, e.g. `revision`.

        Raises:
            FileNotFoundError: If a folder lacks a file.
            ValueError: If it holds another class, or a file is broken.
        """
        directory = Path(pretrained_model_name_or_path)
        # A relative path of more than two parts, or one that exists, is no name of the hub
        if directory.exists() or directory.is_absolute() or len(directory.parts) != 2:
            if not (directory / "config.json").is_file():
                raise FileNotFoundError(
                    f"{directory} has no config.json; expected a folder that save_pretrained wrote"
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
