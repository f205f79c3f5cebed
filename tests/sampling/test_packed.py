"""Weights that are packed once for all steps: equal products, and a model that is as it was afterwards."""

from unittest import mock

import pytest
import torch
from families import CONFIGS, make, policy

from trl_drcd.sampling.packed import LEAST_STEPS, PackedWeight, packable, packed_weights

pytestmark = pytest.mark.skipif(not packable(torch.ones(1, 1), LEAST_STEPS), reason="a build of torch without MKL")


def packed_products(calls) -> int:
    """How many products of a profile used a packed weight."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calls()
    return sum(event.count for event in profile.key_averages() if event.key == "mkl::_mkl_linear")


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (8, 1, 7), (4, 3, 7)])
def test_products_equal_those_of_float64(shape, bias):
    weight, x = torch.randn(5, 7), torch.randn(shape)
    offset = torch.randn(5) if bias else None
    product = PackedWeight(weight)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    for _ in range(3):  # plain, packed now, packed before
        torch.testing.assert_close(product(x, offset).double(), exact, rtol=1e-5, atol=1e-5)
    assert packed_products(lambda: product(x, offset)) == 1


@torch.no_grad()
def test_it_packs_again_when_the_number_of_rows_has_changed():
    weight = torch.randn(5, 7)
    product = PackedWeight(weight)
    for rows, packed in ((4, 0), (4, 1), (3, 0), (3, 1), (3, 1), (4, 0), (0, 0), (0, 0)):
        x = torch.randn(rows, 7)
        found = []
        assert packed_products(lambda x=x, found=found: found.append(product(x))) == packed
        torch.testing.assert_close(found[0], x @ weight.T)


@torch.no_grad()
def test_rows_and_weights_need_not_be_contiguous():
    whole = torch.randn(7, 10)
    weight, x = whole.t()[2:7], torch.randn(7, 6).t()
    product = PackedWeight(weight)
    product(x)
    torch.testing.assert_close(product(x), x @ weight.T)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 2, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(0, 2),
        torch.ones(2, 2, device="meta"),
        torch.ones(2, 2, 2),
    ],
    ids=["float64", "bfloat16", "empty", "another device", "no matrix"],
)
def test_other_weights_are_not_packed(weight):
    assert not packable(weight, LEAST_STEPS)


def test_neither_in_few_steps_nor_under_autocast():
    weight = torch.ones(2, 2)
    assert packable(weight, LEAST_STEPS)
    assert not packable(weight, LEAST_STEPS - 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not packable(weight, LEAST_STEPS)


def test_a_model_is_as_it_was_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    own = model[1].forward = mock.Mock(side_effect=model[1].forward)  # as accelerate's hooks do
    with pytest.raises(RuntimeError), packed_weights(model, LEAST_STEPS):
        assert "forward" in vars(model[0])
        assert model[1].forward is own
        raise RuntimeError
    assert "forward" not in vars(model[0])
    assert model[1].forward is own


def test_a_large_model_stays_as_it_is():
    model = torch.nn.Linear(3, 3)
    with mock.patch("trl_drcd.sampling.packed.MOST_WEIGHTS", 8), packed_weights(model, LEAST_STEPS):
        assert "forward" not in vars(model)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_is_the_same_as_with_plain_products(name, guidance_scale):
    model, prompts, negatives = make(name), [[1, 5, 6, 4], [1, 4], [1, 4]], [[1, 4]] * 3

    def sampled():
        torch.manual_seed(0)
        return policy().rollout(model, prompts, negatives, guidance_scale, max_new_tokens=12, eos_token_ids=[])

    plain, packed = sampled(), []
    with mock.patch("trl_drcd.sampling.packed.LEAST_STEPS", 12):
        assert packed_products(lambda: packed.append(sampled())) >= 10
    assert torch.equal(packed[0].ids, plain.ids)
    torch.testing.assert_close(packed[0].log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)
