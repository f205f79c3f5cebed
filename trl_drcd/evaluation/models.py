"""Load the models of rows: the base, trained models, and interpolations of several."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from trl_drcd.evaluation.allowed import suppressed_tokens
from trl_drcd.evaluation.strategies import Row, is_adapter
from trl_drcd.merging import hold_checkpoints, set_interpolation_weight
from trl_drcd.merging.adapters import BASE
from trl_drcd.validation.model_folders import load_model


class Models:
    """
    Loads models of rows and keeps the latest set in memory: a sweep of lambda loads its two checkpoints once.

    Args:
        base (`str`): Folder or Hub name of the base model.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Data type of all models.
        device (`torch.device`, *optional*): Device of all models; if `None`, the accelerator if there is one, else the
            CPU.

    Raises:
        ValueError: If the base has a weight that is NaN or infinite.
    """

    def __init__(self, base: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.base_name, self.dtype = base, dtype
        self.device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.base = self._load(base)
        _check_finite(self.base, f"`model={base}`")
        self._loaded: tuple[tuple[str, ...], Any] = ((), self.base)

    def __call__(self, row: Row) -> Any:
        """
        The row's model in evaluation mode; valid until the next call.

        Raises:
            ValueError: If it has a weight that is NaN or infinite.
        """
        if not row.models:
            return self.base
        if self._loaded[0] != row.models:
            self._loaded = ((), self.base)  # frees memory before loading
            self._loaded = (row.models, self._assemble(row.models))
        model = self._loaded[1]
        if len(row.models) > 1:
            ends = list(zip(row.models, row.weights, strict=True))
            if isinstance(model, PeftModel):  # the base is the last end of an adapter, wherever it stands
                ends = sorted(ends, key=lambda end: end[0] == BASE)
            set_interpolation_weight(model, [weight for _, weight in ends])
        _check_finite(model, f"`strategies` ({row.strategy}): {' + '.join(row.models)}")
        return model

    def _assemble(self, names: tuple[str, ...]) -> Any:
        if adapters := [name for name in names if name != BASE and is_adapter(name)]:
            model: Any = PeftModel.from_pretrained(self._load(self.base_name), adapters[0], adapter_name="end0")
            for index, name in enumerate(adapters[1:], 1):
                model.load_adapter(name, f"end{index}")
            model.generation_config.suppress_tokens = suppressed_tokens(adapters)
            return model.eval()
        ends = [self.base_name if name == BASE else name for name in names]
        model = self._load(ends[0])
        if len(ends) > 1:
            hold_checkpoints(model, ends)
        return model

    def _load(self, name: str) -> Any:
        return load_model(name, dtype=self.dtype).eval().to(self.device)


def _check_finite(model: Any, where: str) -> None:
    """Raise `ValueError` if a weight is NaN or infinite; the samples would be noise without any other error."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{where} has a weight that is not finite, in {name}; train it again, or leave it out")
