"""What is measured of single terms' gradients, where it can be."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from trl_drcd.term_gradients import TermGradients


def test_scaled_gradients_are_not_measured():
    """The gradient scaler of `fp16` multiplies the gradient of the sum, which is then no sum of the terms' own."""
    model, accelerator = nn.Linear(2, 1, bias=False), Accelerator(cpu=True)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 3.0]])

    def measured(scale):
        gradients = TermGradients(accelerator)
        losses = dict(zip(("distillation", "diversity"), inputs, strict=True))
        losses = {name: model(row) for name, row in losses.items()}
        names = gradients.needed(["diversity"], logged=True, apart=False)
        if names:
            gradients.take(model, losses, names, False, 1)
        model.zero_grad()
        (scale * sum(loss.mean() for loss in losses.values())).backward()
        return gradients.measure(model, 1.0, 0)

    assert measured(1.0) == {"grad_norm/distillation": 1.0, "grad_norm/diversity": 3.0}
    accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0**16)
    try:
        assert measured(2.0**16) == {}
    finally:
        accelerator.scaler = None
