"""What is compared: models, guidance, temperatures and interpolations, expanded to one row each; models in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from trl_drcd.merging import hold_checkpoints, set_interpolation_weight
from trl_drcd.merging.adapters import BASE
from trl_drcd.merging.blend import check_weights
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.model_folders import check_adapter_folder, check_model, load_model

SWEPT = ("guidance_scale", "temperature", "interpolation_weight")
MAX_NAME, MAX_SWEEP = 100, 1000


@dataclass(frozen=True)
class Row:
    """
    One way to sample: a model, or a mixture of several, with a guidance scale and a temperature.

    Args:
        strategy (`str`): What a sweep is called; the rows of one strategy are one curve.
        models (`tuple[str, ...]`): Folders, hub names or LoRA adapters, of which one may be `"base"`; `()` is the base
            alone.
        weights (`tuple[float, ...]`): One for each model; they sum to 1.
        guidance_scale (`float`): gamma of Eq. (1) of https://huggingface.co/papers/2410.06084; 1 is off.
        temperature (`float`): T of the sampling.
        negative_prompt (`str`, *optional*): x^- where there is guidance.
        interpolation_weight (`float`, *optional*): lambda, where there are two models.
        diversity_coef (`float`, *optional*): What the model was trained with, for the record.
        training_seed (`int`, *optional*): Which of several trainings alike it is of; such rows are one point.
    """

    strategy: str
    models: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    temperature: float = 0.99
    negative_prompt: str | None = None
    interpolation_weight: float | None = None
    diversity_coef: float | None = None
    training_seed: int | None = None

    @property
    def point(self) -> str:
        """The strategy, with what is swept in it: the same for all training seeds."""
        marks = {"guidance_scale": "gamma", "temperature": "T", "interpolation_weight": "lambda"}
        defaults = {"guidance_scale": 1.0, "temperature": 0.99, "interpolation_weight": None}
        parts = [f"{marks[n]} {getattr(self, n):g}" for n in SWEPT if getattr(self, n) != defaults[n]]
        return " ".join([self.strategy, *([f"({', '.join(parts)})"] if parts else [])])

    @property
    def name(self) -> str:
        """The point, with the training seed where there are several."""
        return self.point if self.training_seed is None else f"{self.point} #{self.training_seed}"

    @property
    def slug(self) -> str:
        """A name for files: letters, digits and underscores, and a few digits of a hash of all fields."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', self.name)[:60].strip('_')}_{digest}"


def expand(strategies: Sequence[dict[str, Any]]) -> list[Row]:
    """
    One row for each value of what a strategy sweeps, and for each training seed.

    Args:
        strategies (`list[dict]`): Each with `name`; `model`, or `models` with `interpolation_weight` (two of them) or
            `weights` (all alike if not given); `guidance_scale`, `temperature`, `negative_prompt`, `diversity_coef`.
            At most one of `guidance_scale`, `temperature` and `interpolation_weight` may be a list. A list as `model`,
            or a list of lists as `models`, is the same training with several seeds: one point, several rows.

    Returns:
        `list[Row]`: In order.

    Raises:
        FileNotFoundError: If a model's folder is not there, or has no safetensors.
        TypeError: If it is no list.
        ValueError: If a key is unknown, a value out of its range, a name is used twice, or a model's folder is broken.
    """
    if not isinstance(strategies, list | tuple):
        raise TypeError(f"`strategies` must be a list of mappings, got {short_repr(strategies)}")
    rows: list[Row] = []
    for number, strategy in enumerate(strategies):
        where = f"`strategies[{number}]`"
        known = {field.name for field in fields(Row)} - {"strategy", "training_seed"} | {"name", "model"}
        if not isinstance(strategy, dict) or not isinstance(strategy.get("name"), str) or not strategy["name"].strip():
            raise ValueError(f"{where} must be a mapping with a `name`, a text, got {short_repr(strategy)}")
        name = strategy["name"]
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(
                f"{where} must have a `name` of at most {MAX_NAME} printable characters, got {short_repr(name)}"
            )
        where = f"{where} ({name})"
        if unknown := sorted(map(str, set(strategy) - known)):
            raise ValueError(f"{where} has {unknown}; known are {sorted(known)}")
        if name in {row.strategy for row in rows}:
            raise ValueError(f"{where} has the name of an earlier one; a sweep is one strategy with a list")
        swept = [part for part in SWEPT if isinstance(strategy.get(part), list)]
        if len(swept) > 1:
            raise ValueError(f"{where} sweeps {swept}; one list at most")
        values: list[Any] = strategy[swept[0]] if swept else [None]
        if not 0 < len(values) <= MAX_SWEEP:
            raise ValueError(
                f"{where}: `{swept[0]}` must hold at least one value and at most {MAX_SWEEP}, got {len(values)}: "
                f"{short_repr(values, 40)}"
            )
        for seed, run in _training_seeds(strategy):
            for value in values:
                one = {k: v for k, v in run.items() if k != "name"} | ({swept[0]: value} if swept else {})
                rows.append(_row(name, one | {"training_seed": seed}, where))
    if not rows:
        raise ValueError("`strategies` is empty; give at least one, e.g. `- {name: base}`")
    return rows


def _training_seeds(strategy: dict[str, Any]) -> list[tuple[int | None, dict[str, Any]]]:
    """The strategy once for each training seed, with its number; `None` where there is one training."""
    for key, kind in (("model", list), ("models", (list, tuple))):
        runs = strategy.get(key)
        if isinstance(runs, list) and runs and (key == "model" or all(isinstance(run, kind) for run in runs)):
            return [(seed, strategy | {key: run}) for seed, run in enumerate(runs)]
    return [(None, strategy)]


def _row(name: str, given: dict[str, Any], where: str) -> Row:
    for part in (*SWEPT, "diversity_coef"):
        value = given.get(part)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{where}: `{part}` must be a number, got {short_repr(value)}")
    if not isinstance(given.get("negative_prompt"), str | None):
        raise ValueError(f"{where}: `negative_prompt` must be a text, got {short_repr(given['negative_prompt'])}")
    models, weights = _ends(given, where), given.pop("weights", None)
    at = given.get("interpolation_weight")
    if at is not None:
        if len(models) != 2 or weights:
            raise ValueError(f"{where}: `interpolation_weight` is for two `models` without `weights`, got {models}")
        if not 0 <= at <= 1:
            raise ValueError(f"{where}: `interpolation_weight` must be in [0, 1], got {at}")
        weights = [1 - at, at]
    weights = weights or [1 / len(models) for _ in models]
    try:
        weights = check_weights(weights, len(models)) if models or weights else []
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    row = Row(name, tuple(models), tuple(weights), **given)
    if not row.guidance_scale >= 0 or not math.isfinite(row.guidance_scale):
        raise ValueError(f"{where}: `guidance_scale` must be finite and at least 0, got {row.guidance_scale}")
    if not row.temperature > 0 or not math.isfinite(row.temperature):
        raise ValueError(f"{where}: `temperature` must be finite and above 0, got {row.temperature}")
    return row


def _ends(given: dict[str, Any], where: str) -> list[str]:
    """The models of a strategy, whose folders, where they are local, are looked at."""
    model, models = given.pop("model", None), given.pop("models", None)
    if model and models:
        raise ValueError(f"{where} has `model` and `models`; give one of them")
    if not isinstance(models, list | None):
        raise ValueError(f"{where}: `models` must be a list of folders or hub names, got {short_repr(models)}")
    ends = [model] if model else list(models or [])
    for end in ends:
        if not isinstance(end, str):
            raise ValueError(f"{where}: `model` must be a folder or a hub name, got {short_repr(end)}")
    trained = [end for end in ends if end != BASE]
    if len(ends) - len(trained) > (1 if trained else 0):
        raise ValueError(
            f"{where}: `{BASE}` is one end beside trained `models`, got {ends}; for the base alone name no model"
        )
    adapters = [is_adapter(end) for end in trained]
    if any(adapters) and not all(adapters):
        raise ValueError(f"{where}: `models` mixes checkpoints and adapters: {ends}; merge the adapters first")
    if any(adapters) and len(trained) < len(ends) != 2:
        raise ValueError(f"{where}: `{BASE}` goes beside one adapter, got {ends}; merge the adapters first")
    for end, adapter in zip(trained, adapters, strict=True):
        try:
            check_adapter_folder("model", Path(end)) if adapter else check_model("model", end)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
    return ends


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


class Models:
    """
    The models of the rows, one set of ends in memory at a time: a sweep of lambda loads two checkpoints once.

    Args:
        base (`str`): Folder or hub name of the base model.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of all.
        device (`torch.device`, *optional*): The accelerator, where there is one, if `None`.
    """

    def __init__(self, base: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.base_name, self.dtype = base, dtype
        self.device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.base = self._load(base)
        self._loaded: tuple[tuple[str, ...], Any] = ((), self.base)

    def __call__(self, row: Row) -> Any:
        """The row's model, in evaluation mode; good until the next call."""
        if not row.models:
            return self.base
        if self._loaded[0] != row.models:
            self._loaded = ((), self.base)  # frees the memory before more is loaded
            self._loaded = (row.models, self._assemble(row.models))
        model = self._loaded[1]
        if len(row.models) > 1:
            weights: float | list[float] = list(row.weights)
            if isinstance(model, PeftModel) and BASE in row.models:
                weights = row.weights[row.models.index(BASE)]  # lambda of one adapter is the base's share
            set_interpolation_weight(model, weights)
        return model

    def _assemble(self, names: tuple[str, ...]) -> Any:
        if adapters := [name for name in names if name != BASE and is_adapter(name)]:
            model: Any = PeftModel.from_pretrained(self._load(self.base_name), adapters[0], adapter_name="end0")
            for index, name in enumerate(adapters[1:], 1):
                model.load_adapter(name, f"end{index}")
            return model.eval()
        ends = [self.base_name if name == BASE else name for name in names]
        model = self._load(ends[0])
        if len(ends) > 1:
            hold_checkpoints(model, ends)
        return model

    def _load(self, name: str) -> Any:
        return load_model(name, dtype=self.dtype).eval().to(self.device)
