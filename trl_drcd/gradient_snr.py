"""
Signal and noise of a term's gradient, from gradients of different updates.

The squared length of one gradient is signal and noise together; the inner product of two gradients of different
samples is signal alone, in expectation. Gradients are kept as sketches, which keep inner products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sketch(tensors: Sequence[torch.Tensor], size: int = 2**14, seed: int = 0) -> torch.Tensor:
    """
    A short vector whose inner products are those of the long ones, but for an error of about `1 / sqrt(size)`.

    Every entry gets a random sign, and the entries a distance of `size` apart are added up.

    Args:
        tensors (`Sequence[torch.Tensor]`): One long vector, in parts.
        size (`int`, *optional*, defaults to 16384): Entries of the sketch.
        seed (`int`, *optional*, defaults to 0): Of the signs; sketches of one seed, and of one kind of device, can be
            compared.

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


def signal_and_noise(sketches: torch.Tensor, squares: torch.Tensor) -> tuple[float, float]:
    """
    Squared length of the mean gradient, and trace of the covariance.

    `signal = mean over a != b of g_a . g_b` and `noise = mean |g_a|^2 - signal`, both unbiased; the signal may come
    out below 0 where there is little of it.

    Args:
        sketches (`torch.Tensor`): Of gradients of different samples, shape `(N, size)`, N at least 2.
        squares (`torch.Tensor`): Squared length of each gradient, shape `(N,)`.

    Returns:
        `tuple[float, float]`: Signal and noise, in squared units of the gradient.
    """
    count, sketches = len(sketches), sketches.double()
    signal = (sketches.sum(0).square().sum() - sketches.square().sum()) / (count * (count - 1))
    return float(signal), float(squares.double().mean() - signal)


class GradientSNR:
    """
    Signal-to-noise ratio of a term's gradient over the last updates that were measured.

    Its value estimates `|E g|^2 / trace Cov(g)` of the gradient g of one update of this run's batch, as if the weights
    had stood still in between. With N gradients its standard error is about `1 / N` of 1 over the root of the number
    of directions that the noise has: a ratio below one in a hundred shows after some thirty.

    Args:
        window (`int`, *optional*, defaults to 32): Gradients that count, the last ones.
        size (`int`, *optional*, defaults to 16384): Entries of a sketch.
    """

    def __init__(self, window: int = 32, size: int = 2**14):
        self.window, self.size = window, size
        self._sketches = torch.zeros(0, size)
        self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, gradient: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """
        Adds an update's gradient.

        Args:
            gradient (`Sequence[torch.Tensor]`): Of all parameters, the mean over all processes.
            scale (`float`, *optional*, defaults to 1.0): Divides it: the term's coefficient, which changes in
                training.
        """
        if not scale > 0:
            return
        short = sketch(gradient, self.size).cpu()[None] / scale
        square = sum(float(part.detach().float().square().sum()) for part in gradient) / scale**2
        if torch.isfinite(short).all():
            self._sketches = torch.cat([self._sketches, short])[-self.window :]
            self._squares = torch.cat([self._squares, torch.tensor([square], dtype=torch.float64)])[-self.window :]

    def value(self) -> float | None:
        """The ratio, no unit; `None` before the second gradient."""
        if len(self._sketches) < 2:
            return None
        signal, noise = signal_and_noise(self._sketches, self._squares)
        return signal / noise if noise > 0 else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold, so that a resumed run logs the same."""
        return {"sketches": self._sketches, "squares": self._squares}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the gradients of a checkpoint."""
        self._sketches, self._squares = state["sketches"], state["squares"]
