"""What is compared: models, guidance, temperatures and interpolations, expanded to one row each; models in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trl_drcd.merging import hold_checkpoints, set_interpolation_weight

SWEPT = ("guidance_scale", "temperature", "interpolation_weight")


@dataclass(frozen=True)
class Row:
    """
    One way to sample: a model, or a mixture of several, with a guidance scale and a temperature.

    Args:
        strategy (`str`): What a sweep is called; the rows of one strategy are one curve.
        models (`tuple[str, ...]`): Folders, hub names or LoRA adapters; `()` is the base.
        weights (`tuple[float, ...]`): One for each model; they sum to 1.
        guidance_scale (`float`): gamma of Eq. (1) of https://huggingface.co/papers/2410.06084; 1 is off.
        temperature (`float`): T of the sampling.
        negative_prompt (`str`, *optional*): x^- where there is guidance.
        interpolation_weight (`float`, *optional*): lambda, where there are two models.
        diversity_coef (`float`, *optional*): What the model was trained with, for the record.
    """

    strategy: str
    models: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    temperature: float = 0.99
    negative_prompt: str | None = None
    interpolation_weight: float | None = None
    diversity_coef: float | None = None

    @property
    def name(self) -> str:
        """The strategy, with what is swept in it."""
        marks = {"guidance_scale": "gamma", "temperature": "T", "interpolation_weight": "lambda"}
        defaults = {"guidance_scale": 1.0, "temperature": 0.99, "interpolation_weight": None}
        parts = [f"{marks[n]} {getattr(self, n):g}" for n in SWEPT if getattr(self, n) != defaults[n]]
        return " ".join([self.strategy, *([f"({', '.join(parts)})"] if parts else [])])

    @property
    def slug(self) -> str:
        """A name for files: letters, digits and underscores, and a few digits of a hash of all fields."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', self.name)[:60].strip('_')}_{digest}"


def expand(strategies: Sequence[dict[str, Any]]) -> list[Row]:
    """
    One row for each value of what a strategy sweeps.

    Args:
        strategies (`list[dict]`): Each with `name`; `model`, or `models` with `interpolation_weight` (two of them) or
            `weights` (all alike if not given); `guidance_scale`, `temperature`, `negative_prompt`, `diversity_coef`.
            At most one of `guidance_scale`, `temperature` and `interpolation_weight` may be a list.

    Returns:
        `list[Row]`: In order.

    Raises:
        ValueError: If a key is unknown, a value out of its range, or a name is used twice.
    """
    rows: list[Row] = []
    for number, strategy in enumerate(strategies):
        where = f"`strategies[{number}]`"
        known = {field.name for field in fields(Row)} - {"strategy"} | {"name", "model"}
        if not isinstance(strategy, dict) or not strategy.get("name"):
            raise ValueError(f"{where} must be a mapping with a `name`, got {strategy!r}")
        where = f"{where} ({strategy['name']})"
        if unknown := sorted(set(strategy) - known):
            raise ValueError(f"{where} has {unknown}; known are {sorted(known)}")
        if strategy["name"] in {row.strategy for row in rows}:
            raise ValueError(f"{where} has the name of an earlier one; a sweep is one strategy with a list")
        swept = [name for name in SWEPT if isinstance(strategy.get(name), list)]
        if len(swept) > 1:
            raise ValueError(f"{where} sweeps {swept}; one list at most")
        values: list[Any] = strategy[swept[0]] if swept else [None]
        for value in values:
            one = {k: v for k, v in strategy.items() if k != "name"} | ({swept[0]: value} if swept else {})
            rows.append(_row(strategy["name"], one, where))
    if not rows:
        raise ValueError("`strategies` is empty; give at least one, e.g. `- {name: base}`")
    return rows


def _row(name: str, given: dict[str, Any], where: str) -> Row:
    model, models = given.pop("model", None), given.pop("models", None)
    if model and models:
        raise ValueError(f"{where} has `model` and `models`; give one of them")
    models = [model] if model else list(models or [])
    weights, at = given.pop("weights", None), given.get("interpolation_weight")
    if at is not None:
        if len(models) != 2 or weights:
            raise ValueError(f"{where}: `interpolation_weight` is for two `models` without `weights`")
        if not 0 <= at <= 1:
            raise ValueError(f"{where}: `interpolation_weight` must be in [0, 1], got {at}")
        weights = [1 - at, at]
    weights = weights or [1 / len(models) for _ in models]
    if len(weights) != len(models) or (models and not math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ValueError(f"{where}: `weights` must be {len(models)} numbers that sum to 1, got {weights}")
    row = Row(name, tuple(map(str, models)), tuple(weights), **given)
    if not row.guidance_scale >= 0 or not math.isfinite(row.guidance_scale):
        raise ValueError(f"{where}: `guidance_scale` must be finite and at least 0, got {row.guidance_scale}")
    if not row.temperature > 0 or not math.isfinite(row.temperature):
        raise ValueError(f"{where}: `temperature` must be finite and above 0, got {row.temperature}")
    return row


class Models:
    """
    The models of the rows, one set of ends in memory at a time: a sweep of lambda loads two checkpoints once.

    Args:
        base (`str`): Folder or hub name of the base model.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of all.
    """

    def __init__(self, base: str, dtype: torch.dtype = torch.float32) -> None:
        self.base_name, self.dtype = base, dtype
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
            set_interpolation_weight(model, list(row.weights))
        return model

    def _assemble(self, names: tuple[str, ...]) -> Any:
        adapters = [(Path(name) / "adapter_config.json").is_file() for name in names]
        if any(adapters) and not all(adapters):
            raise ValueError(f"`models` mixes checkpoints and adapters: {list(names)}; merge the adapters first")
        if all(adapters):
            model: Any = PeftModel.from_pretrained(self._load(self.base_name), names[0], adapter_name="end0")
            for index, name in enumerate(names[1:], 1):
                model.load_adapter(name, f"end{index}")
            return model.eval()
        model = self._load(names[0])
        if len(names) > 1:
            hold_checkpoints(model, list(names))
        return model

    def _load(self, name: str) -> PreTrainedModel:
        import transformers

        config: Any = AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        return kind.from_pretrained(name, dtype=self.dtype).eval()
