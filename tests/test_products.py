"""Float32 products by oneDNN in place of MKL: equal values and gradients, and only where they fit."""

import copy
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from trl_drcd.compat import products
from trl_drcd.compat.products import add_product, fast_products, linear, product_library, torch_linear
from trl_drcd.heads import Head
from trl_drcd.losses import weighted_terms
from trl_drcd.sampling import packed
from trl_drcd.sampling.packed import LASTING, PackedProduct

pytestmark = pytest.mark.skipif(product_library() is None, reason="a build of torch without MKL or oneDNN")
ROWS, INPUTS, OUTPUTS = 80, 64, 96


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """oneDNN, whatever the processor of this machine."""
    monkeypatch.setattr(products, "product_library", lambda: "oneDNN")


def by_onednn(function):
    """The result, and how many products of it were oneDNN's."""
    with mock.patch.object(products, "_by_onednn", wraps=products._by_onednn) as used:
        return function(), used.call_count


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("GenuineIntel", "AVX512", "MKL"),
        ("GenuineIntel", "AVX2", "MKL"),
        ("AuthenticAMD", "AVX512", "oneDNN"),
        ("AuthenticAMD", "AVX2", "MKL"),
        ("Unheard of", "AVX512", "MKL"),
    ],
)
def test_the_library_depends_on_the_processor_alone(tmp_path, monkeypatch, maker, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    (file := tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\nflags\t: fpu avx512f\n")
    assert product_library(file) == expected


def test_a_build_without_the_operators_has_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert product_library(tmp_path) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, INPUTS), (3, ROWS, INPUTS), (2, 3, 16, INPUTS)])
@pytest.mark.parametrize("frozen", ["none", "weight", "x"])
def test_values_and_gradients_equal_those_of_float64(shape, bias, frozen):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=frozen != "x"), torch.randn(OUTPUTS, INPUTS)
    weight.requires_grad_(frozen != "weight")
    given = [x, weight] + [torch.randn(OUTPUTS, requires_grad=frozen != "weight")] * bias
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in given]
    found, used = by_onednn(lambda: linear(*given))
    assert used == 1
    reference = torch.nn.functional.linear(*exact)
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-4)
    direction = torch.randn_like(found)
    _, used = by_onednn(lambda: found.backward(direction))
    assert used == (2 if frozen == "none" else 1)
    reference.backward(direction.double())
    for one, other in zip(given, exact, strict=True):
        assert (one.grad is None) == (not one.requires_grad)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


def test_what_torch_does_with_a_product():
    """Derivatives forward, gradients in a batch, an input that changes later, tracing, and oneDNN turned off."""
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    with forward_ad.dual_level():
        product = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        tangent = forward_ad.unpack_dual(product).tangent
    torch.testing.assert_close(tangent, torch_linear(torch.ones_like(x), weight), rtol=1e-4, atol=1e-4)
    given, directions = (x.clone().requires_grad_(), weight.clone().requires_grad_()), torch.randn(3, ROWS, OUTPUTS)
    batched = [
        torch.autograd.grad(product(*given), given, directions, is_grads_batched=True)
        for product in (linear, torch_linear)
    ]
    torch.testing.assert_close(*batched, rtol=1e-4, atol=1e-4)
    hidden = given[0] * 1
    found, used = by_onednn(lambda: linear(hidden, weight))
    hidden += 1  # the gradient of a frozen layer's input does not need the input
    found.sum().backward()
    assert used == 1
    torch.testing.assert_close(given[0].grad, weight.sum(0).expand(ROWS, -1), rtol=1e-4, atol=1e-4)
    layer = torch.nn.Linear(INPUTS, OUTPUTS)
    with fast_products():
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))
    with torch.backends.mkldnn.flags(enabled=False):
        assert by_onednn(lambda: linear(x, weight))[1] == 0


def test_it_keeps_no_more_for_the_gradient_than_torch():
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    for of_x, of_weight in ((True, True), (True, False), (False, True)):
        kept = []
        given = x.requires_grad_(of_x), weight.requires_grad_(of_weight)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
            linear(*given)
        assert len(kept) == of_x + of_weight


def test_gradients_have_gradients():
    x, weight = torch.randn(ROWS, INPUTS, requires_grad=True), torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    found = []
    for product in (linear, torch.nn.functional.linear):
        (slope,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, weight)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1)  # of entries of 1e4


def matrices(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Matrices with strides of all kinds."""
    return {
        "plain": torch.randn(rows, columns),
        "transposed": torch.randn(columns, rows).t(),
        "columns of a wider one": torch.randn(rows, 3 * columns)[:, columns : 2 * columns],
        "every third column": torch.randn(rows, 3 * columns)[:, ::3],
        "every second row": torch.randn(2 * rows, columns)[::2],
        "one row": torch.randn(1, columns).expand(rows, columns),
        "one column": torch.randn(rows, 1).expand(rows, columns),
        "one entry": torch.randn(1, 1).expand(rows, columns),
        "rows that overlap": torch.randn(rows + columns).unfold(0, columns, 1)[:rows],
        "not at the start": torch.randn(rows * columns + 3)[3:].view(rows, columns),
    }


BIASES = {
    "none": None,
    "plain": torch.randn(OUTPUTS),
    "every second": torch.randn(2 * OUTPUTS)[::2],
    "one entry": torch.randn(1).expand(OUTPUTS),
    "not at the start": torch.randn(OUTPUTS + 1)[1:],
}


@torch.no_grad()
@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("strides", matrices(1, 1))
def test_whatever_the_strides(monkeypatch, strides, bias, library):
    """oneDNN refuses some, and ignores those of a bias; packed or not."""
    for module in (products, packed):
        monkeypatch.setattr(module, "product_library", lambda: library)
    x = matrices(ROWS, INPUTS)[strides]
    for name, weight in matrices(OUTPUTS, INPUTS).items():
        expected = torch_linear(x, weight, BIASES[bias])
        torch.testing.assert_close(linear(x, weight, BIASES[bias]), expected, rtol=1e-4, atol=1e-4, msg=name)
        product = PackedProduct()
        for _ in range(LASTING + 1):
            found = product(x, weight, BIASES[bias])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(8, 10, INPUTS).transpose(0, 1),
        torch.randn(8, INPUTS, 10).transpose(1, 2),
        torch.randn(1, 10, INPUTS).expand(8, 10, INPUTS),
        torch.randn(4, 20, 3 * INPUTS).chunk(3, -1)[1],
    ],
    ids=["transposed", "transposed within", "expanded", "a chunk"],
)
def test_whatever_the_strides_of_a_batch(x):
    weight = torch.randn(OUTPUTS, INPUTS)
    found, used = by_onednn(lambda: linear(x, weight))
    assert used == 1
    torch.testing.assert_close(found, torch_linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", matrices(1, 1))
@pytest.mark.parametrize(
    "loss", [torch.sum, lambda y: y[:, 0].sum(), lambda y: y.mean(0).square().sum()], ids=["sum", "column", "mean"]
)
def test_gradients_whatever_the_strides(strides, loss):
    """The gradient of a sum is one number, expanded."""
    gradients = []
    for product in (linear, torch_linear):
        torch.manual_seed(0)
        x, weight = (matrices(rows, INPUTS)[strides].requires_grad_() for rows in (ROWS, OUTPUTS))
        gradients.append(torch.autograd.grad(loss(product(x, weight)), (x, weight)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [
        (torch.randn(15, INPUTS), torch.randn(OUTPUTS, INPUTS)),
        (torch.randn(0, INPUTS), torch.randn(OUTPUTS, INPUTS)),
        (torch.randn(INPUTS), torch.randn(OUTPUTS, INPUTS)),
        (torch.randn(ROWS, 8), torch.randn(8, 8)),
        (torch.randn(ROWS, INPUTS).double(), torch.randn(OUTPUTS, INPUTS).double()),
        (torch.randn(ROWS, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS).bfloat16()),
        (torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS).as_subclass(type("Sharded", (torch.Tensor,), {}))),
        (torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), torch.randn(1)),
        (torch.randn(ROWS, INPUTS, device="meta"), torch.randn(OUTPUTS, INPUTS, device="meta")),
        (torch.randn(ROWS, INPUTS), torch.randn(INPUTS)),
    ],
    ids=["few rows", "no rows", "a vector", "a small weight", "float64", "bfloat16", "a subclass", "a broadcast bias",
         "meta", "a weight of one output"],
)  # fmt: skip
def test_others_are_multiplied_by_torch(given):
    found, used = by_onednn(lambda: linear(*given))
    assert used == 0
    expected = torch.nn.functional.linear(*given)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.device.type == "cpu":
        torch.testing.assert_close(found, expected)


def test_neither_under_autocast_nor_in_transforms_nor_when_traced():
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        found, used = by_onednn(lambda: linear(x, weight))
    assert used == 0 and found.dtype == torch.bfloat16
    found, used = by_onednn(lambda: torch.func.vmap(lambda row: linear(row, weight))(x[None]))
    assert used == 0
    torch.testing.assert_close(found[0], x @ weight.T)
    with fast_products():
        exported = torch.export.export(torch.nn.Linear(INPUTS, OUTPUTS), (x,))
    assert "linear" in str(exported.graph)


def test_a_wrong_size_is_an_error_of_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(ROWS, INPUTS + 1), torch.randn(OUTPUTS, INPUTS))


@torch.no_grad()
def test_a_product_is_added_in_place():
    total, left, right = torch.randn(ROWS, OUTPUTS), torch.randn(INPUTS, ROWS).t(), torch.randn(INPUTS, OUTPUTS)
    expected = total + left @ right
    _, used = by_onednn(lambda: add_product(total, left, right))
    assert used == 1
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    _, used = by_onednn(lambda: add_product(total.double(), left.double(), right.double()))
    assert used == 0
    for wrong in (torch.zeros(5, ROWS, OUTPUTS), total.bfloat16()):
        with pytest.raises(RuntimeError):
            add_product(wrong, left, right)


def test_models_compute_by_it_inside_of_the_context_alone(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch_linear)  # put back at the end, whatever fails
    model, attention = torch.nn.Linear(INPUTS, OUTPUTS), torch.nn.MultiheadAttention(INPUTS, 4)
    x = torch.randn(ROWS, INPUTS)
    expected = model(x)
    with fast_products():
        found, used = by_onednn(lambda: model(x))
        with fast_products():
            assert by_onednn(lambda: model(x))[1] == 1
        assert by_onednn(lambda: model(x))[1] == 1
        assert by_onednn(lambda: attention(x, x, x))[1] == 4  # projections, which a function of torch calls
    torch.testing.assert_close(found, expected)
    assert used == 1 and by_onednn(lambda: model(x))[1] == 0
    with mock.patch.object(torch.nn.functional, "linear", side_effect=torch_linear) as other:
        assert by_onednn(lambda: linear(x[:1], model.weight))[1] == 0 and other.called  # a few rows are theirs
    with fast_products():
        torch.nn.functional.linear = other = mock.Mock()
    assert torch.nn.functional.linear is other  # put there inside, by whoever it was
    torch.nn.functional.linear = torch_linear
    with mock.patch.object(torch.nn.functional, "linear", lambda *given: torch_linear(*given)) as other:
        with fast_products():  # as DeepSpeed's
            assert torch.nn.functional.linear is other and by_onednn(lambda: model(x))[1] == 0
        assert torch.nn.functional.linear is other
    with pytest.raises(KeyError), fast_products():
        raise KeyError
    assert torch.nn.functional.linear is torch_linear


def test_it_holds_until_the_last_thread_has_left():
    """Else a forward that is repeated in the backward would be by another library."""
    first, second = fast_products(), fast_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.nn.functional.linear is linear
    second.__exit__(None, None, None)
    assert torch.nn.functional.linear is torch_linear


def test_on_intel_nothing_changes(monkeypatch):
    monkeypatch.setattr(products, "product_library", lambda: "MKL")
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    with fast_products():
        found, used = by_onednn(lambda: torch.nn.functional.linear(x, weight))
    assert used == 0 and torch.equal(found, torch.nn.functional.linear(x, weight))
    assert torch.equal(linear(x, weight), found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_repeated_in_the_backward(reentrant):
    """The repeated one must keep the same tensors, so it must be by the same library."""
    layer, x = torch.nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS, requires_grad=True)
    plain = copy.deepcopy(layer)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with fast_products():
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_of_a_head(monkeypatch, softcap):
    """Loss and gradients of the student's projection, in chunks, against those by MKL."""
    torch.manual_seed(0)
    size, rows = 96, 160
    teacher = Head(torch.randn(size, INPUTS), torch.randn(size), softcap=softcap)
    ids, kl_weights, credit = torch.randint(size, (rows,)), torch.rand(rows), torch.randn(rows)
    given = torch.randn(rows, INPUTS), torch.randn(size, INPUTS), torch.randn(size), torch.randn(rows, INPUTS)

    def loss_and_gradients():
        hidden, weight, bias = (each.clone().requires_grad_() for each in given[:3])
        terms = weighted_terms(
            hidden, Head(weight, bias, softcap=softcap), ids, lambda part: teacher.logits(given[3][part]), kl_weights,
            credit, logits_per_chunk=80 * size,
        )  # fmt: skip
        terms.loss.backward()
        return terms.loss, hidden.grad, weight.grad, bias.grad

    found, used = by_onednn(loss_and_gradients)
    assert used == 2 * 4  # student, teacher, and the two gradients, of each chunk
    monkeypatch.setattr(products, "product_library", lambda: "MKL")
    torch.testing.assert_close(found, loss_and_gradients(), rtol=1e-4, atol=1e-4)
