"""The state of a run besides weights and optimizer: random states and the current rollout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.diversity_term import DiversityTerm

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


class Progress:
    """
    What a checkpoint holds besides weights, optimizer and random states, so that a run resumes bit for bit: the
    batches of the current rollout that later updates need, and the critic.

    After each update [`remember`] keeps these and the random states, so that a checkpoint of the last good state can
    still be written when the next batch is bad.

    Args:
        args ([`CFGDistillDiversityConfig`]): The trainer's arguments.
        accelerator (`Accelerator`): Of the launch.
        diversity ([`~trl_drcd.diversity_term.DiversityTerm`], *optional*): Has the critic.
    """

    def __init__(
        self, args: CFGDistillDiversityConfig, accelerator: Accelerator, diversity: DiversityTerm | None
    ) -> None:
        self.args, self.accelerator, self.diversity = args, accelerator, diversity
        self.batches = int(args.steps_per_generation or 1)  # of a rollout
        self._last: tuple[int, int, Batches | None, dict[str, torch.Tensor], tuple[Any, ...]] | None = None

    def save(self, folder: Path, forward: int, rollout: Batches | None) -> None:
        """
        Write it into a checkpoint.

        Args:
            folder (`Path`): The checkpoint.
            forward (`int`): Number of forwards done, from which TRL derives the next part of a rollout.
            rollout (`list[dict]`, *optional*): The batches of the current rollout.
        """
        if self.args.should_save and self.diversity is not None:
            self.diversity.save(folder)
        used_up = forward % (self.batches * self.args.num_iterations) == 0
        if rollout is not None and not used_up:
            save_rollout(folder, rollout, forward, self.accelerator.process_index, self.accelerator.num_processes)

    def load(self, folder: Path) -> tuple[int, Batches] | None:
        """Read what [`save`] wrote; returns `forward` and `rollout`, `None` if the rollout is to be sampled again."""
        if self.diversity is not None:
            self.diversity.load(folder)
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        loaded = load_rollout(folder, self.batches, *ranks, self.accelerator.device)
        return None if loaded is None else loaded[::-1]

    def remember(self, updates: int, forward: int, rollout: Batches | None) -> None:
        """Keep the state after `updates` updates; the critic's tensors are never modified in place."""
        critic = {} if self.diversity is None else self.diversity.state
        self._last = updates, forward, rollout, critic, random_states()

    def go_back(self, updates: int) -> tuple[int, Batches | None] | None:
        """Restore what was kept after `updates` updates, if it was; returns `forward` and `rollout`."""
        if self._last is None or self._last[0] != updates:
            return None
        _, forward, rollout, critic, random = self._last
        if self.diversity is not None:
            self.diversity.state = critic
        set_random_states(random)
        return forward, rollout


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
