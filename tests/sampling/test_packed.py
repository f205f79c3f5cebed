"""Weights that are packed once for all steps: equal products, and a model that is as it was afterwards."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from families import CONFIGS, OTHERS, make, policy
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize, prune

from trl_drcd.compat import products
from trl_drcd.compat.products import product_library
from trl_drcd.heads import Head
from trl_drcd.sampling import packed, static_cache
from trl_drcd.sampling.packed import LASTING, LEAST_ROWS, PackedProduct, packed_head, packed_weights

pytestmark = pytest.mark.skipif(product_library() is None, reason="a build of torch without MKL or oneDNN")
PROMPTS = [[1, 5, 6, 4], [1, 4], [1, 4], [1, 7]] * (LEAST_ROWS // 4)
NEGATIVES = [[1, 4]] * len(PROMPTS)


@pytest.fixture(autouse=True, params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Each library, whatever the processor of this machine."""
    for module in (products, packed):
        monkeypatch.setattr(module, "product_library", lambda: request.param)
    return request.param


def packed_products(calls) -> int:
    """How many products used a packed weight."""
    with mock.patch.object(packed, "packed_product", wraps=packed.packed_product) as used:
        calls()
    return used.call_count


def last_of(product, x, *weights) -> tuple[torch.Tensor, bool]:
    """The last of as many products as it takes to pack, and whether it was with a packed weight."""
    for _ in range(LASTING + 1):
        product(x, *weights)
    found = []
    used = packed_products(lambda: found.append(product(x, *weights)))
    return found[0], used == 1


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 7), (8, 1, 7), (3, 4, 7)])
def test_products_equal_those_of_float64(shape, bias):
    weight, x, product = torch.randn(5, 7), torch.randn(shape), PackedProduct()
    offset = torch.randn(5) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    for _ in range(LASTING):
        torch.testing.assert_close(product(x, weight, offset).double(), exact, rtol=1e-5, atol=1e-5)
    found = []
    assert packed_products(lambda: found.append(product(x, weight, offset))) == 1
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_packs_once_the_number_of_rows_lasts():
    weight, product = torch.randn(5, 7), PackedProduct()
    for rows, used in ((9, 1), (8, 1), (LEAST_ROWS - 1, 0), (1, 0), (0, 0)):
        x = torch.randn(rows, 7)
        assert packed_products(lambda x=x: [product(x, weight) for _ in range(LASTING)]) == 0
        found = []
        assert packed_products(lambda x=x, found=found: found.append(product(x, weight))) == used
        torch.testing.assert_close(found[0], x @ weight.T)


@torch.no_grad()
def test_rows_and_weights_need_not_be_contiguous():
    weight, x = torch.randn(7, 10).t()[2:7], torch.randn(7, 8).t()
    found, used = last_of(PackedProduct(), x, weight)
    assert used
    torch.testing.assert_close(found, x @ weight.T)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "by data", "another"])
def test_a_weight_that_changes_is_packed_anew(change):
    weight, x, product = torch.nn.Parameter(torch.randn(5, 7)), torch.randn(8, 7), PackedProduct()
    last_of(product, x, weight)
    if change == "in place":
        weight.mul_(2)
    elif change == "by data":
        weight.data = torch.randn(5, 7)
    else:
        weight = torch.nn.Parameter(torch.randn(5, 7))
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    found, used = last_of(product, x, weight)
    assert used
    torch.testing.assert_close(found, x @ weight.T)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(8, 7).double(), torch.randn(5, 7).double(), None),
        (torch.randn(8, 7).bfloat16(), torch.randn(5, 7).bfloat16(), None),
        (torch.randn(8, 7), torch.randn(5, 7), torch.randn(1)),
        (torch.randn(8, 7), torch.randn(0, 7), None),
        (torch.randn(8, 7), torch.randn(5, 7).as_subclass(type("Sharded", (torch.Tensor,), {})), None),
    ],
    ids=["float64", "bfloat16", "a bias that is broadcast", "no outputs", "a subclass of Tensor"],
)
def test_others_are_multiplied_as_before(x, weight, bias):
    found, used = last_of(PackedProduct(), x, weight, bias)
    assert not used
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))


def test_neither_with_gradients_nor_under_autocast():
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(8, 7)
    found, used = last_of(PackedProduct(), x, weight)
    assert not used and found.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, used = last_of(PackedProduct(), x, weight)
    assert not used and found.dtype == torch.bfloat16


@torch.no_grad()
def test_a_wrong_size_is_an_error_after_packing_too():
    weight, product = torch.randn(5, 7), PackedProduct()
    last_of(product, torch.randn(8, 7), weight)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(torch.randn(8, 6), weight)


@torch.no_grad()
def test_a_head_projects_what_its_plain_one_does():
    head = Head(torch.randn(5, 7), torch.randn(5), 2.0, softcap=3.0, compute_dtype=None)
    fast, hidden = packed_head(head), torch.randn(8, 7)
    found, used = last_of(lambda x: fast.logits(x), hidden)
    assert used
    torch.testing.assert_close(found, head.logits(hidden))
    torch.testing.assert_close(fast.logits(hidden.double()), head.logits(hidden.double()))  # and in float64
    some = packed_head(Head(torch.randn(5, 7), token_ids=torch.tensor([1, 3]), compute_dtype=None))
    assert last_of(lambda x: some.logits(x), hidden)[0].shape == (8, 2)
    with mock.patch.object(packed, "MOST_WEIGHTS", 34):
        assert not last_of(lambda x: packed_head(head).logits(x), hidden)[1]


def test_a_model_is_as_it_was_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    own = model[1].forward = mock.Mock(side_effect=model[1].forward)  # as accelerate's hooks do
    with pytest.raises(RuntimeError), packed_weights(model), packed_weights(model):
        assert "forward" in vars(model[0])
        assert model[1].forward is own
        assert copy.deepcopy(model)[0](input=torch.ones(1, 3)).shape == (1, 3)
        raise RuntimeError
    assert "forward" not in vars(model[0])
    assert model[1].forward is own


@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(3, 3).double(), type("Own", (torch.nn.Linear,), {})(3, 3)], ids=["float64", "a subclass"]
)
def test_other_layers_and_large_models_stay_as_they_are(layer):
    with packed_weights(layer):
        assert "forward" not in vars(layer)
    with mock.patch.object(packed, "MOST_WEIGHTS", 8), packed_weights(model := torch.nn.Linear(3, 3)), torch.no_grad():
        assert not last_of(lambda x: model(x), torch.randn(LEAST_ROWS, 3))[1]


def rollout(model, guidance_scale=1.0, steps=LASTING + 8, adapter=None):
    torch.manual_seed(0)
    return policy().rollout(adapter or model, PROMPTS, NEGATIVES, guidance_scale, 0.9, steps, eos_token_ids=[])


def plainly(function):
    """Without packed weights."""
    with (
        mock.patch("trl_drcd.sampling.modes.packed_weights", nullcontext),
        mock.patch("trl_drcd.sampling.loop.packed_head", lambda head: head),
    ):
        return function()


def with_biases(name):
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_is_the_same_as_with_plain_products(name, guidance_scale):
    model, found = with_biases(name), []
    plain = plainly(lambda: rollout(model, guidance_scale))
    layers = sum(type(module) is torch.nn.Linear for module in model.base_model.modules())
    used = packed_products(lambda: found.append(rollout(model, guidance_scale)))
    assert used >= (1 + layers // 2) * 5  # the head, and most layers, in most of the 8 steps after `LASTING`
    assert torch.equal(found[0].ids, plain.ids)
    torch.testing.assert_close(found[0].log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_so_is_one_by_generate_in_mixed_precision(name):
    """`trainer.sample` calls the policy inside of accelerate's autocast of `forward` alone."""
    model = make(name)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    plain = plainly(lambda: rollout(model))
    torch.testing.assert_close(rollout(model).log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)


def adapted(**settings):
    model = get_peft_model(make("llama, grouped keys"), LoraConfig(init_lora_weights=False, **settings))
    return model.get_base_model(), model


def parametrized():
    model = make("llama, grouped keys")
    parametrize.register_parametrization(model.base_model.layers[0].mlp.down_proj, "weight", torch.nn.Softsign())
    return model, None


def pruned():
    model = make("llama, grouped keys")
    prune.l1_unstructured(model.base_model.layers[0].mlp.down_proj, "weight", 0.5)
    return model, None


@pytest.mark.parametrize(
    "made",
    [
        lambda: adapted(target_modules=["q_proj", "down_proj"]),
        lambda: adapted(target_modules=["q_proj"], use_dora=True),
        lambda: adapted(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
        parametrized,
        pruned,
    ],
    ids=["LoRA", "DoRA", "LoRA of parameters", "parametrized", "pruned"],
)
def test_a_second_rollout_has_the_weights_of_its_time(made):
    """Of adapters, and of layers that compute their weight when they are called."""
    model, adapter = made()
    rollout(model, adapter=adapter)
    for parameter in (adapter or model).parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            parameter.data.mul_(1.3)
    plain, now = plainly(lambda: rollout(model, adapter=adapter)), rollout(model, adapter=adapter)
    torch.testing.assert_close(now.log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)
    assert torch.equal(now.ids, plain.ids)


def test_a_compiled_step_has_its_own_way_with_weights(monkeypatch):
    used = []
    monkeypatch.setattr("trl_drcd.sampling.modes.packed_weights", lambda model: used.append(model) or nullcontext())
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    for static in (True, False):
        with static_cache(static):
            rollout(make("qwen2"), steps=4)
        assert bool(used) is not static
