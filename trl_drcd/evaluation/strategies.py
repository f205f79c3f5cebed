"""The strategies of an evaluation (models, guidance, temperatures, interpolations), parsed, checked and expanded."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from trl_drcd.evaluation.results import USUAL_TEMPERATURE
from trl_drcd.guidance import EarlySteps
from trl_drcd.merging.adapters import BASE
from trl_drcd.merging.blend import check_weights
from trl_drcd.merging.folders import find_folder
from trl_drcd.merging.lora import check_mixed_in_memory, load_adapter_config
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.model_folders import check_adapter_folder, check_model, check_on_hub, is_hub_name

Given = Mapping[str, object]
"""A strategy as parsed from the YAML file."""

SWEPT = {
    "guidance_scale": "gamma", "early_steps": "early", "early_guidance_scale": "early gamma", "temperature": "T",
    "interpolation_weight": "lambda", "checkpoint": "step",
}  # fmt: skip
"""Settings that can be swept with a list, and their symbols in names."""
MAX_NAME, MAX_SWEEP = 100, 1000

KEYS = {
    "name": "its name in tables and plots",
    "model": "folder, Hub name or LoRA adapter; the base if not given. A list is the same training with several "
    "seeds: one point, several rows",
    "models": "several models to merge; `base` may be one. A list of lists is one merge for each training seed",
    "weights": "of `models`; equal if not given",
    "interpolation_weight": "lambda, in place of `weights`, for two `models`: (1 - lambda) first + lambda second",
    "guidance_scale": "gamma of classifier-free guidance; 1, the default, turns it off",
    "early_steps": "first steps of a completion, guided with `early_guidance_scale`; 0 if not given",
    "early_guidance_scale": "gamma of the early steps; 1 if not given, which is the conditional model",
    "negative_prompt": "x^- of guidance, for prompts without their own",
    "temperature": f"sampling temperature; {USUAL_TEMPERATURE} if not given",
    "diversity_coef": "coefficient that the model was trained with, for the report only",
    "first_training_seed": "number of the first training of a list, for trainings that are measured later; 0 if not "
    "given",
    "checkpoint": "training step, in place of the final weights: the folder `checkpoint-<step>` of each model",
}
"""The keys of a strategy."""


@dataclass(frozen=True)
class Row:
    """
    Settings of one set of samples: a model, or an interpolation of several, guidance scale and temperature.

    Args:
        strategy (`str`): Name of the strategy; the rows of one strategy form one curve.
        models (`tuple[str, ...]`): Folders, Hub names or LoRA adapters, of which one may be `"base"`; `()` is the base
            alone.
        weights (`tuple[float, ...]`): Interpolation weight of each model; they sum to 1.
        guidance_scale (`float`): gamma of Eq. (1) of https://huggingface.co/papers/2410.06084; 1 turns guidance off.
        temperature (`float`): Sampling temperature T.
        negative_prompt (`str`, *optional*): x^- of guidance for prompts without their own.
        interpolation_weight (`float`, *optional*): lambda, if there are two models.
        diversity_coef (`float`, *optional*): Coefficient that the model was trained with, for the report only.
        training_seed (`int`, *optional*): Number of the training among repetitions with other seeds; these rows are
            pooled into one point.
        early_steps, early_guidance_scale: First steps of completions, and their guidance scale.
        checkpoint (`int`, *optional*): Training step of the models; `None` for their final weights.
    """

    strategy: str
    models: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    temperature: float = USUAL_TEMPERATURE
    negative_prompt: str | None = None
    interpolation_weight: float | None = None
    diversity_coef: float | None = None
    training_seed: int | None = None
    early_steps: int = 0
    early_guidance_scale: float = 1.0
    checkpoint: int | None = None

    @property
    def early(self) -> EarlySteps | None:
        """The early steps; `None` if there are none."""
        return EarlySteps(self.early_steps, self.early_guidance_scale) if self.early_steps else None

    @property
    def point(self) -> str:
        """The strategy with its swept value; the same for all training seeds."""
        usual = {
            "guidance_scale": 1.0,
            "early_steps": 0,
            "early_guidance_scale": 1.0,
            "temperature": USUAL_TEMPERATURE,
            "interpolation_weight": None,
            "checkpoint": None,
        }
        values = {mark: getattr(self, name) for name, mark in SWEPT.items() if getattr(self, name) != usual[name]}
        parts = [f"{mark} {value}" if mark == "step" else f"{mark} {value:g}" for mark, value in values.items()]
        return " ".join([self.strategy, *([f"({', '.join(parts)})"] if parts else [])])

    @property
    def name(self) -> str:
        """The point, with the training seed if there are several."""
        return self.point if self.training_seed is None else f"{self.point} #{self.training_seed}"

    @property
    def slug(self) -> str:
        """A unique file name: the row's name in letters, digits and underscores, and a hash of all fields."""
        fields = asdict(self)
        if self.early is None:  # as in earlier versions, whose files keep their names
            del fields["early_steps"], fields["early_guidance_scale"]
        if self.checkpoint is None:
            del fields["checkpoint"]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', self.name)[:60].strip('_')}_{digest}"


def expand(strategies: Sequence[Given]) -> list[Row]:
    """
    Expand strategies into one row per swept value and training seed.

    Args:
        strategies (`list[dict]`): Each with `name` and optionally other [`KEYS`]. At most one of `guidance_scale`,
            `early_steps`, `early_guidance_scale`, `temperature`, `interpolation_weight` and `checkpoint` may be a
            list, a sweep.

    Returns:
        `list[Row]`: In order.

    Raises:
        FileNotFoundError: If a model's folder does not exist, or has no safetensors.
        TypeError: If `strategies` is not a list.
        ValueError: If a key is unknown, a value is out of range, a name is used twice, or a model's folder is broken.
    """
    if not isinstance(strategies, list | tuple):
        raise TypeError(f"`strategies` must be a list of mappings, got {short_repr(strategies)}")
    rows: list[Row] = []
    for number, strategy in enumerate(strategies):
        name = _name(strategy, f"`strategies[{number}]`")
        where = f"`strategies[{number}]` ({name})"
        if unknown := sorted(map(str, set(strategy) - set(KEYS))):
            raise ValueError(f"{where} has unknown keys {unknown}; known are {sorted(KEYS)}")
        if name in {row.strategy for row in rows}:
            raise ValueError(
                f"{where} repeats the name of an earlier strategy; write a sweep as one strategy with a list"
            )
        own = [
            _row(name, one, seed, where)
            for seed, run in _training_seeds(strategy, where)
            for one in _sweep(run, where)
        ]
        _check_names(own, rows, where)
        rows += own
    if not rows:
        raise ValueError("`strategies` is empty; give at least one, e.g. `- {name: base}`")
    return rows


def chosen(strategies: Sequence[Given], only: Sequence[str]) -> Sequence[Given]:
    """
    The strategies whose names are in `only`; all if `only` is empty.

    Raises:
        ValueError: If `only` has a name that no strategy has.
    """
    if not only or not isinstance(strategies, list):
        return strategies
    names = [strategy.get("name") for strategy in strategies if isinstance(strategy, dict)]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"`only` has unknown names {unknown}; the strategies are {names}")
    return [strategy for strategy in strategies if isinstance(strategy, dict) and strategy.get("name") in only]


def _name(strategy: Given, where: str) -> str:
    name = strategy.get("name") if isinstance(strategy, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} must be a mapping with a `name`, a non-empty string, got {short_repr(strategy)}")
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{where} must have a `name` of at most {MAX_NAME} printable characters, got {short_repr(name)}"
        )
    return name


def _training_seeds(strategy: Given, where: str) -> list[tuple[int | None, Given]]:
    """The strategy for each training seed, with the seed's number; `None` if there is a single training."""
    first = strategy.get("first_training_seed")
    if first is not None and (type(first) is not int or first < 0):
        raise ValueError(f"{where}: `first_training_seed` must be a whole number, at least 0, got {short_repr(first)}")
    for key, kind in (("model", object), ("models", list | tuple)):
        runs = strategy.get(key)
        if isinstance(runs, list) and runs and all(isinstance(run, kind) for run in runs):
            return [(seed, {**strategy, key: run}) for seed, run in enumerate(runs, first or 0)]
    if first is not None:
        raise ValueError(f"{where}: `first_training_seed` needs a list of trainings, in `model` or `models`")
    return [(None, strategy)]


def _check_names(rows: Sequence[Row], earlier: Sequence[Row], where: str) -> None:
    """Rows of one point are repetitions with other seeds, and pooled: no other row may have the point's name."""
    points, names = {row.point for row in earlier}, {row.name for row in earlier}
    for row in rows:
        if row.point in points or row.name in names:
            raise ValueError(
                f"{where} has a second row called `{row.name}`; leave a repeated value out, or rename a strategy"
            )
        names.add(row.name)


def _sweep(strategy: Given, where: str) -> Iterator[Given]:
    """The strategy for each value of its sweep."""
    lists = {part: value for part in SWEPT if isinstance(value := strategy.get(part), list)}
    if not lists:
        return iter([strategy])
    if len(lists) > 1:
        raise ValueError(f"{where} has lists for {list(lists)}; at most one setting can be swept")
    ((part, values),) = lists.items()
    if not 0 < len(values) <= MAX_SWEEP:
        raise ValueError(
            f"{where}: `{part}` must hold at least one value and at most {MAX_SWEEP}, got {len(values)}: "
            f"{short_repr(values, 40)}"
        )
    return ({**strategy, part: value} for value in values)


def _row(name: str, given: Given, training_seed: int | None, where: str) -> Row:
    numbers = {part: _number(given, part, where) for part in (*SWEPT, "diversity_coef")}
    negative = given.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise ValueError(f"{where}: `negative_prompt` must be a string, got {short_repr(negative)}")
    step = _checkpoint(numbers["checkpoint"], given, where)
    models = _ends(given, where, step)
    guidance, temperature = numbers["guidance_scale"], numbers["temperature"]
    row = Row(
        name,
        tuple(models),
        _weights(models, given.get("weights"), numbers["interpolation_weight"], where),
        1.0 if guidance is None else guidance,
        USUAL_TEMPERATURE if temperature is None else temperature,
        negative,
        numbers["interpolation_weight"],
        numbers["diversity_coef"],
        training_seed,
        *_early(numbers["early_steps"], numbers["early_guidance_scale"], guidance, where),
        checkpoint=step,
    )
    if not row.guidance_scale >= 0 or not math.isfinite(row.guidance_scale):
        raise ValueError(f"{where}: `guidance_scale` must be finite and at least 0, got {row.guidance_scale}")
    if not row.temperature > 0 or not math.isfinite(row.temperature):
        raise ValueError(f"{where}: `temperature` must be finite and above 0, got {row.temperature}")
    return row


def _early(count: float | None, scale: float | None, guidance_scale: float | None, where: str) -> tuple[int, float]:
    """The number of early steps, 0 if it is not given, and their guidance scale."""
    if count is None:
        if scale is not None:
            raise ValueError(f"{where}: `early_guidance_scale` needs `early_steps`, the number of these steps")
        return 0, 1.0
    if not math.isfinite(count) or count < 0 or int(count) != count:
        raise ValueError(f"{where}: `early_steps` must be a whole number, at least 0, got {count}")
    if guidance_scale in (None, 1):
        raise ValueError(f"{where}: `early_steps` needs a `guidance_scale` other than 1, which turns guidance off")
    scale = 1.0 if scale is None else scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"{where}: `early_guidance_scale` must be finite and at least 0, got {scale}")
    return int(count), scale


def _checkpoint(step: float | None, given: Given, where: str) -> int | None:
    """The training step of the models, if one is given."""
    if step is None:
        return None
    if not math.isfinite(step) or step < 1 or int(step) != step:
        raise ValueError(f"{where}: `checkpoint` must be a training step, a whole number of at least 1, got {step}")
    if not given.get("model") and not given.get("models"):
        raise ValueError(f"{where}: `checkpoint` needs a `model` whose training saved checkpoints")
    return int(step)


def _number(given: Given, part: str, where: str) -> float | None:
    value = given.get(part)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{where}: `{part}` must be a number, got {short_repr(value)}")
    return value  # type: ignore[return-value] # an integer stays one, which keeps digests of earlier results valid


def _weights(models: list[str], given: object, at: float | None, where: str) -> tuple[float, ...]:
    """The weights of the models, which sum to 1."""
    weights: Any = given
    if at is not None:
        if len(models) != 2 or given:
            raise ValueError(
                f"{where}: `interpolation_weight` needs exactly two `models` and no `weights`, got `models={models}` "
                f"and `weights={given}`"
            )
        if not 0 <= at <= 1:
            raise ValueError(f"{where}: `interpolation_weight` must be in [0, 1], got {at}")
        weights = [1 - at, at]
    weights = weights or [1 / len(models) for _ in models]
    try:
        return tuple(check_weights(weights, len(models))) if models or weights else ()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _ends(given: Given, where: str, step: int | None = None) -> list[str]:
    """The models of a strategy, or their checkpoints of a step, after checking those that are local folders."""
    model, models = given.get("model"), given.get("models")
    if model and models:
        raise ValueError(f"{where} has both `model` and `models`; give only one of them")
    if not isinstance(models, list | None):
        raise ValueError(f"{where}: `models` must be a list of folders or Hub names, got {short_repr(models)}")
    ends: list[str] = []
    for end in [model] if model else list(models or []):
        if not isinstance(end, str):
            raise ValueError(f"{where}: `model` must be a folder or a Hub name, got {short_repr(end)}")
        ends.append(end if step is None or end == BASE else _checkpoint_folder(end, step, where))
    trained = [end for end in ends if end != BASE]
    if len(ends) - len(trained) > (1 if trained else 0):
        raise ValueError(
            f"{where}: `{BASE}` may occur once, together with trained `models`, got {ends}; for the base alone give "
            "no model"
        )
    for end in trained:
        if is_adapter(end) and (Path(end) / "model.safetensors").is_file():
            raise ValueError(
                f"{where}: {end} holds both a whole model and a LoRA adapter, one of them from an earlier run; remove "
                "its files, adapter_* or model.safetensors"
            )
    adapters = [is_adapter(end) for end in trained]
    if any(adapters) and not all(adapters):
        for end in (end for end in trained if not Path(end).exists()):
            check_on_hub(where, end)
        raise ValueError(f"{where}: `models` mixes checkpoints and adapters: {ends}; merge the adapters first")
    if any(adapters) and len(trained) < len(ends) != 2:
        raise ValueError(f"{where}: `{BASE}` can be mixed with only one adapter, got {ends}; merge the adapters first")
    for end, adapter in zip(trained, adapters, strict=True):
        try:
            check_adapter_folder("model", find_folder(end, "model")) if adapter else check_model("model", end)
            if adapter and len(ends) > 1:
                check_mixed_in_memory(load_adapter_config(find_folder(end, "model"), "models"), end)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
    return ends


def _checkpoint_folder(model: str, step: int, where: str) -> str:
    """The folder of a model's checkpoint."""
    folder = Path(model) / f"checkpoint-{step}"
    if not Path(model).exists():
        raise FileNotFoundError(f"{where}: `checkpoint` needs the local folder of a training, got {short_repr(model)}")
    if not folder.is_dir():
        there = sorted((path.name for path in Path(model).glob("checkpoint-*")), key=lambda name: (len(name), name))
        raise FileNotFoundError(
            f"{where}: `checkpoint={step}` needs the folder {folder}, which does not exist; {model} has {there}. "
            "Training keeps checkpoints of every `save_steps` steps, at most `save_total_limit` of them"
        )
    return str(folder)


def is_adapter(name: str) -> bool:
    """Whether a folder, or a model on the Hub or in its cache, is an adapter."""
    if Path(name).exists() or not is_hub_name(name):
        return (Path(name) / "adapter_config.json").is_file()
    return _is_adapter_on_hub(name)


@functools.cache
def _is_adapter_on_hub(name: str) -> bool:
    try:
        hf_hub_download(name, "adapter_config.json")
    except OSError:  # it has no such file, or the Hub cannot be reached
        return False
    return True
