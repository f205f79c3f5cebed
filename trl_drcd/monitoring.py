"""What is logged of an update, over all processes: loss terms, rollouts, and times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from trl_drcd.diversity_term import ScoredDiversity
from trl_drcd.losses import BatchTerms


class RunningMeans:
    """
    Means of the loss terms since the last log, over the rows and tokens of all processes and forwards.

    Accumulates sums, because the numbers of tokens and rows differ between forwards and processes.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def reset(self) -> None:
        """Reset all sums."""
        self.sums = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """
        Add one forward of all processes.

        Args:
            rows (`dict[str, torch.Tensor]`): Values of each sequence, shape `(B,)`: the loss terms by name, including
                `distillation` (the KL); `entropy`; all in nats; and the number of `tokens`.
        """
        names, values = list(rows), torch.stack(list(rows.values()))
        for name, value in zip([*names, "rows"], [*values.sum(1).tolist(), values.shape[1]], strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        """Means in nats: loss terms and KL per sequence, KL and entropy per token."""
        sums = dict(self.sums)
        rows, tokens, entropy = sums.pop("rows"), max(1.0, sums.pop("tokens")), sums.pop("entropy")
        kl = sums["distillation"]
        terms = {f"loss/{name}": value / rows for name, value in sums.items()}
        return terms | {"kl": kl / rows, "kl_per_token": kl / tokens, "entropy": entropy / tokens}


class StepLog:
    """
    What the trainer logs of rollouts and loss terms, over all processes.

    Args:
        metrics (`dict`): TRL's metrics by mode (`train`, `eval`), lists of numbers by name.
        table (`dict`): TRL's table of completions, columns by name.
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(self, metrics: dict[str, Any], table: dict[str, Any], accelerator: Accelerator) -> None:
        self.metrics, self.table, self.accelerator = metrics, table, accelerator
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}

    def gathered(self, rows: torch.Tensor, mode: str) -> torch.Tensor:
        """Rows of all processes; in evaluation without the first ones again that fill up the last batch."""
        return self.accelerator.gather(rows) if mode == "train" else self.accelerator.gather_for_metrics(rows)

    def add(self, mode: str, values: Mapping[str, float]) -> None:
        """Add one value to each of these metrics."""
        for name, value in values.items():
            self.metrics[mode][name].append(value)

    def diversity(self, mode: str, scored: ScoredDiversity) -> None:
        """Log the diversity of a rollout, the metrics that come with it, and the reward of each completion."""
        mean = self.gathered(scored.rewards, mode).mean().item()
        self.add(mode, {"diversity": mean} | scored.metrics)
        self.table["rewards"]["diversity"].extend(scored.all_rewards.tolist())

    def advantages(self, credits: Iterable[torch.Tensor], mask: torch.Tensor) -> None:
        """
        Replace the rollout's advantages in the table of completions, TRL's, by those that the loss uses.

        Args:
            credits (`Iterable[torch.Tensor]`): Of each term, `(b, 1, 1)` or `(b, S, K)`; their sum is logged as a mean
                over the completion's tokens.
            mask (`torch.Tensor`): True where a code is scored, `(b, S, K)`.
        """
        total = sum((credit * mask).sum((1, 2)) for credit in credits) / mask.sum((1, 2)).clamp(min=1)
        column = self.table["advantages"]
        for _ in range(min(self.accelerator.num_processes * len(mask), len(column))):
            column.pop()
        column.extend(self.accelerator.gather(total).tolist())

    def ends(self, mode: str, ended: torch.Tensor, lengths: torch.Tensor) -> None:
        """
        Replace TRL's metrics of how a rollout's completions end, which it tells by their last ids.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            ended (`torch.Tensor`): Whether each ended before the maximal length, boolean `(b,)`.
            lengths (`torch.Tensor`): Ids of each, int64 `(b,)`.
        """
        rows = self.accelerator.gather(torch.stack([ended.to(lengths), lengths], dim=1)).float()
        whole = rows[rows[:, 0] > 0, 1] if rows[:, 0].any() else rows.new_zeros(1)
        values = {"mean_terminated": whole.mean(), "min_terminated": whole.min(), "max_terminated": whole.max()}
        metrics = {f"{name}_length": value for name, value in values.items()}
        for name, value in (metrics | {"clipped_ratio": 1 - rows[:, 0].mean()}).items():
            self.metrics[mode][f"completions/{name}"][-1] = value.item()

    def reward_is_diversity(self, mode: str) -> None:
        """Log the diversity as `reward`, in place of TRL's, where there are no other reward functions."""
        metrics = self.metrics[mode]
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)
        if "diversity" in metrics:
            metrics["reward"] = list(metrics["diversity"])

    def gathered_terms(self, mode: str, terms: BatchTerms, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The values of each sequence of all processes, shape `(B,)`, of one forward: `losses` and entropy in nats, and
        the number of tokens.
        """
        columns = losses | {"entropy": terms.entropy, "tokens": terms.tokens}
        rows = self.gathered(torch.stack([column.detach().to(terms.kl) for column in columns.values()], dim=1), mode)
        return dict(zip(columns, rows.T, strict=True))

    def terms(self, mode: str, gathered: dict[str, torch.Tensor], diversity_coef: float) -> None:
        """Add the [`gathered_terms`] of one forward, and the coefficient of the update."""
        metrics, running = self.metrics[mode], self._means[mode]
        if "kl" not in metrics:  # cleared since, by `log`
            running.reset()
        running.add(gathered)
        metrics |= {name: [value] for name, value in running.values().items()}
        self.add(mode, {"diversity_coef": diversity_coef})


class Stopwatch:
    """Seconds of an update, split into `parts`; the remaining time is counted as `update`."""

    parts = ("rollout", "teacher", "reward")

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.seconds = dict.fromkeys((*self.parts, "update"), 0.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the body to `name`."""
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda" and name != "update":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the duration of the body."""
        before = dict(self.seconds)
        yield
        self.seconds = before

    def lap(self) -> dict[str, float]:
        """Return `time/...` of this update in seconds, averaged over the processes, and start the next update."""
        self.seconds["update"] -= sum(self.seconds[name] for name in self.parts)
        here = torch.tensor(list(self.seconds.values()), device=self.accelerator.device)
        means = self.accelerator.reduce(here, reduction="mean").tolist()
        names = [f"time/{name}" for name in self.seconds]
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return dict(zip(names, means, strict=True))
