"""The state of a run besides weights and optimizer: random states and the current rollout."""

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
    """Random states of Python, NumPy, torch, and the GPU that this process uses."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def set_random_states(states: tuple[Any, ...]) -> None:
    """Restore the states returned by [`random_states`]."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


@dataclass
class Snapshot:
    """
    The state after an update that a checkpoint stores besides weights and optimizer.

    Args:
        global_step (`int`): Number of updates done.
        forward (`int`): Number of forwards done, from which TRL derives the next part of a rollout.
        rollout (`list[dict]`, *optional*): The batches of the current rollout.
        critic (`dict`): State of the critic, whose tensors are never modified in place; empty without a critic.
        random (`tuple`): [`random_states`]; defaults to the current ones.
    """

    global_step: int
    forward: int
    rollout: Batches | None
    critic: dict[str, torch.Tensor]
    random: tuple[Any, ...] = field(default_factory=random_states)


def _rollout_file(folder: Path, process: int) -> Path:
    return folder / f"rollout_{process}.safetensors"


def save_rollout(folder: Path, rollout: Batches, forward: int, process: int, processes: int) -> None:
    """Write the sampled batches of this process that later updates still need (several updates per rollout)."""
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
    Read the batches and the number of forwards written by [`save_rollout`].

    Args:
        folder (`Path`): The checkpoint.
        count (`int`): Number of batches of a rollout.
        process, processes (`int`): Rank and number of processes.
        device (`torch.device`): Device of the tensors.

    Returns:
        `tuple`: Batches and number of forwards; `None` if there is no file or the number of processes differs, in
        which case the rollout is sampled again.
    """
    file = _rollout_file(folder, process)
    if not file.is_file():
        return None
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        metadata = tensors.metadata()
        if metadata["processes"] != str(processes):
            return None
        batches: Batches = [{} for _ in range(count)]
        for key in tensors.keys():  # noqa: SIM118 - not a dictionary
            number, name = key.split(".", 1)
            batches[int(number)][name] = tensors.get_tensor(key)
    return batches, int(metadata["step"])
