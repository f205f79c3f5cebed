"""The order of the prompts, reproduced on resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from trl_drcd.compat.trl_private import RepeatSampler


class EpochSampler(Sampler):
    """
    Wraps TRL's `RepeatSampler` so that it reproduces its order on resume in a later epoch.

    Args:
        sampler (`RepeatSampler`): Reshuffles at each epoch with one generator.
        trainer (`Trainer`): Its state gives the current epoch.
    """

    def __init__(self, sampler: RepeatSampler, trainer: Any) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int(self.trainer.state.epoch or 0)):  # one draw per epoch
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)
