"""
Signal and noise of a loss term's gradient, from gradients of different updates.

The squared norm of one gradient has the expectation signal plus noise; the inner product of two gradients from
different samples has the expectation signal. Gradients are stored as sketches, which preserve inner products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sketch(tensors: Sequence[torch.Tensor], size: int = 2**14, seed: int = 0) -> torch.Tensor:
    """
    A short vector that preserves inner products up to a relative error of about `1 / sqrt(size)`.

    Every entry is multiplied by a random sign, and entries at a distance of `size` are summed.

    Args:
        tensors (`Sequence[torch.Tensor]`): A vector, in parts.
        size (`int`, *optional*, defaults to 16384): Entries of the sketch.
        seed (`int`, *optional*, defaults to 0): Seed of the signs; only sketches with the same seed and device type
            can be compared.

    Returns:
        `torch.Tensor`: Shape `(size,)`, float32.
    """
    total = torch.zeros(size, device=tensors[0].device)
    for index, tensor in enumerate(tensors):
        flat = tensor.detach().flatten().float()
        generator = torch.Generator(flat.device).manual_seed(seed + index)
        signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device, dtype=torch.int8)
        padded = torch.nn.functional.pad(torch.where(signs.bool(), flat, -flat), (0, -len(flat) % size))
        total += padded.view(-1, size).sum(0).to(total.device)
    return total


def signal_and_noise(sketches: torch.Tensor, squares: torch.Tensor, rollouts: torch.Tensor) -> tuple[float, float]:
    """
    Squared norm of the mean gradient, and trace of its covariance.

    `signal = mean over a, b of different rollouts of g_a . g_b` and `noise = mean |g_a|^2 - signal`. Both estimates
    are unbiased; a small signal may have a negative estimate.

    Args:
        sketches (`torch.Tensor`): Sketches of gradients, shape `(N, size)`.
        squares (`torch.Tensor`): Squared norm of each gradient, shape `(N,)`.
        rollouts (`torch.Tensor`): Number of the rollout that each gradient is of, `(N,)`; at least two different ones.

    Returns:
        `tuple[float, float]`: Signal and noise, in squared units of the gradient.
    """
    sketches, others = sketches.double(), rollouts[:, None] != rollouts
    signal = (sketches @ sketches.T)[others].mean()
    return float(signal), float(squares.double().mean() - signal)


class GradientSNR:
    """
    Signal-to-noise ratio of a loss term's gradient over the last measured updates.

    Estimates `|E g|^2 / trace Cov(g)` of the gradient g of one update with this run's batch size, assuming that the
    weights change little within the window. With N gradients, the standard error is about `1 / (N sqrt(d))`, where d
    is the effective number of dimensions of the noise: ratios below 0.01 become visible after about thirty gradients.

    Args:
        window (`int`, *optional*, defaults to 32): Number of most recent gradients that are used.
        size (`int`, *optional*, defaults to 16384): Entries of a sketch.
    """

    def __init__(self, window: int = 32, size: int = 2**14):
        self.window, self.size = window, size
        self._sketches = torch.zeros(0, size)
        self._squares = torch.zeros(0, dtype=torch.float64)
        self._rollouts = torch.zeros(0, dtype=torch.long)

    def add(self, gradient: Sequence[torch.Tensor], rollout: int, scale: float = 1.0) -> None:
        """
        Add the gradient of an update; ignored if it is not finite or `scale` is not above 0.

        Args:
            gradient (`Sequence[torch.Tensor]`): Gradient of all parameters, averaged over all processes.
            rollout (`int`): Number of the rollout that it is of; updates that share one share its noise.
            scale (`float`, *optional*, defaults to 1.0): Divides the gradient: the term's coefficient, which changes
                during training.
        """
        if not scale > 0:
            return
        short = sketch(gradient, self.size).cpu()[None] / scale
        square = sum(float(part.detach().float().square().sum()) for part in gradient) / scale**2
        if torch.isfinite(short).all():
            self._sketches = torch.cat([self._sketches, short])[-self.window :]
            self._squares = torch.cat([self._squares, torch.tensor([square], dtype=torch.float64)])[-self.window :]
            self._rollouts = torch.cat([self._rollouts, torch.tensor([rollout])])[-self.window :]

    def value(self) -> float | None:
        """The ratio (no unit); `None` with gradients of fewer than two rollouts, or if the noise is not above 0."""
        if len(self._rollouts.unique()) < 2:
            return None
        signal, noise = signal_and_noise(self._sketches, self._squares, self._rollouts)
        return signal / noise if noise > 0 else None
