"""Sketches of gradients, and the signal and noise that they tell apart."""

import pytest
import torch

from trl_drcd.gradient_snr import GradientSNR, signal_and_noise, sketch


def test_a_sketch_keeps_inner_products():
    torch.manual_seed(0)
    a, b = torch.randn(60_000), torch.randn(60_000)
    b = 0.5 * a + b
    parts = [[v[:25_000].view(250, 100), v[25_000:]] for v in (a, b)]
    short = [sketch(part, 4096) for part in parts]
    exact, length = a @ b, a.norm() * b.norm()
    assert short[0].shape == (4096,)
    assert abs(short[0] @ short[1] - exact) < 4 / 4096**0.5 * length
    assert abs(short[0] @ short[0] - a @ a) < 4 / 4096**0.5 * (a @ a)
    assert torch.equal(short[0], sketch(parts[0], 4096))


def test_signal_and_noise_by_hand():
    gradients = torch.tensor([[3.0, 1.0], [3.0, -1.0]])  # inner product 8, squares 10
    assert signal_and_noise(gradients, gradients.square().sum(1), torch.arange(len(gradients))) == pytest.approx(
        (8.0, 2.0)
    )


def test_finds_the_ratio_of_known_signal_and_noise():
    """Signal of length 1, noise of variance 4 in 20,000 directions; the coefficient drops out."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.nn.functional.normalize(torch.randn(20_000, generator=generator), dim=0)
    snr = GradientSNR(window=30, size=2048)
    assert snr.value() is None
    for step in range(40):
        noise = 2 * torch.randn(20_000, generator=generator) / 20_000**0.5
        coef = 1.0 + step
        snr.add([coef * (signal + noise)[:5000], coef * (signal + noise)[5000:]], step, coef)
    assert len(snr._sketches) == 30
    assert snr.value() == pytest.approx(0.25, rel=0.05)


def test_pure_noise_has_no_ratio():
    generator = torch.Generator().manual_seed(0)
    snr = GradientSNR(size=2048)
    for step in range(32):
        snr.add([torch.randn(20_000, generator=generator)], step)
    assert abs(snr.value()) < 0.005


@pytest.mark.parametrize("updates", [2, 4])
def test_updates_of_one_rollout_share_its_noise(updates):
    """Pure noise, each gradient used in several updates: no signal."""
    generator = torch.Generator().manual_seed(0)
    snr = GradientSNR(size=2048)
    for rollout in range(8):
        gradient = [torch.randn(20_000, generator=generator)]
        for _ in range(updates):
            snr.add(gradient, rollout)
    assert abs(snr.value()) < 0.01


def test_what_is_left_out():
    snr = GradientSNR(size=64)
    snr.add([torch.ones(3)], 0, 0.0)  # without the term there is nothing to measure
    snr.add([torch.tensor([torch.nan])], 1)
    assert not len(snr._squares)
    snr.add([torch.tensor([1.0, 2.0])], 2)
    snr.add([torch.tensor([2.0, 2.0])], 2)
    assert snr.value() is None  # of one rollout
    snr.add([torch.tensor([1.0, 0.0])], 3)
    assert snr.value() is not None
