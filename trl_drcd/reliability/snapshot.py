"""The state after an update that its weights and optimizer do not hold: random states and the rollout in use."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Batches = list[dict[str, torch.Tensor]]


def random_states() -> tuple[Any, ...]:
    """Of Python, NumPy, torch, and the GPU that this process uses."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def set_random_states(states: tuple[Any, ...]) -> None:
    """Restores what [`random_states`] gave."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


@dataclass
class Snapshot:
    """
    What a checkpoint after an update would hold beside weights and optimizer.

    Args:
        global_step (`int`): Updates done.
        forward (`int`): Forwards done, by which TRL knows which part of a rollout is next.
        rollout (`list[dict]`, *optional*): The batches of the rollout in use.
        critic (`dict`): State of the critic, whose tensors are never changed in place; empty without one.
        random (`tuple`): [`random_states`], as of now by default.
    """

    global_step: int
    forward: int
    rollout: Batches | None
    critic: dict[str, torch.Tensor]
    random: tuple[Any, ...] = field(default_factory=random_states)


def _rollout_file(folder: Path, process: int) -> Path:
    return folder / f"rollout_{process}.safetensors"


def save_rollout(folder: Path, rollout: Batches, forward: int, process: int, processes: int) -> None:
    """Writes the batches of this process that are sampled but not used up, where a rollout serves several updates."""
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, batch in enumerate(rollout)
        for name, tensor in batch.items()
    }
    save_file(tensors, _rollout_file(folder, process), {"step": str(forward), "processes": str(processes)})


def load_rollout(
    folder: Path, count: int, process: int, processes: int, device: torch.device
) -> tuple[Batches, int] | None:
    """
    The batches and the number of forwards that [`save_rollout`] wrote.

    Args:
        folder (`Path`): The checkpoint.
        count (`int`): Batches of a rollout.
        process, processes (`int`): Rank and number of processes.
        device (`torch.device`): Where the tensors go.

    Returns:
        `tuple`, or `None` where there is no such file, or one of another number of processes: then the rollout is
        sampled anew.
    """
    file = _rollout_file(folder, process)
    if not file.is_file():
        return None
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        metadata = tensors.metadata()
        if metadata["processes"] != str(processes):
            return None
        batches: Batches = [{} for _ in range(count)]
        for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
            number, name = key.split(".", 1)
            batches[int(number)][name] = tensors.get_tensor(key)
    return batches, int(metadata["step"])
