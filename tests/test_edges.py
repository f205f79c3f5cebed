"""Numbers at the edge against the definition in float64, by hypothesis: no probability, extreme lengths."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_drcd.diversity import diversity_advantages, group_diversity
from trl_drcd.guidance import guide_logits
from trl_drcd.heads import Head
from trl_drcd.losses import reverse_kl, token_log_probs, token_terms, weighted_terms

V = 5
EDGES = st.one_of(
    st.floats(-8, 8, width=32),
    st.sampled_from([-math.inf, -1e30, -200.0, -104.0, -88.0, 0.0, 88.0, 200.0, 1e4]),
)
ROWS = st.lists(EDGES, min_size=V, max_size=V).filter(lambda row: max(row) > -math.inf)
TEMPERATURES = st.sampled_from([0.3, 0.99, 1.0, 3.0])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
FUZZED = settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    total = math.log(math.fsum(math.exp(value - top) for value in scaled))
    return [value - top - total for value in scaled]


def defined_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    """`sum p (log p - log q)`, in float64 and by the definition; nothing of p = 0."""
    log_p, log_q = log_softmax(student, temperature), log_softmax(teacher, temperature)
    terms = []
    for a, b in zip(log_p, log_q, strict=True):
        if a == -math.inf:
            continue
        if b == -math.inf:
            return math.inf
        terms.append(math.exp(a) * (a - b))
    return math.fsum(terms)


def assert_near(found: float, expected: float, scale: float = 1.0) -> None:
    """Equal, infinities too, but for rounding of float32 at numbers of this size."""
    assert found == expected or abs(found - expected) <= 1e-5 * (1 + abs(expected)) + 3e-7 * scale, (found, expected)


def largest(*rows: list[float]) -> float:
    return max(abs(value) for row in rows for value in row if math.isfinite(value))


@pytest.mark.slow
@FUZZED
@given(ROWS, ROWS, TEMPERATURES, DTYPES, DTYPES)
def test_kl_is_its_definition(student, teacher, temperature, own_dtype, teacher_dtype):
    """Of any data types, what they hold of the numbers."""
    given_rows = torch.tensor([student]).to(own_dtype), torch.tensor([teacher]).to(teacher_dtype)
    rows = [row[0].double().tolist() for row in given_rows]
    if not all(max(row) < math.inf for row in rows):
        return
    found = reverse_kl(*given_rows, temperature)
    assert found.dtype == torch.promote_types(torch.promote_types(own_dtype, teacher_dtype), torch.float32)
    assert_near(found.item(), defined_kl(*rows, temperature), largest(*rows) / temperature)


def identity(rows: torch.Tensor, biased: bool) -> tuple[torch.Tensor, Head]:
    """Hidden states and a head of which these rows are the logits; -inf only a bias can make."""
    finite = rows.masked_fill(rows.isneginf(), 0.0)
    bias = torch.where(rows[0].isneginf(), -torch.inf, 0.0) if biased else None
    return finite.requires_grad_(), Head(torch.eye(rows.shape[1]).to(rows), None if bias is None else bias.to(rows))


@pytest.mark.slow
@FUZZED
@given(ROWS, ROWS, TEMPERATURES, st.integers(0, V - 1), st.sampled_from([torch.float32, torch.float64]), DTYPES)
def test_the_chunked_terms_are_the_same_definition(student, teacher, temperature, token, dtype, teacher_dtype):
    logits = torch.tensor([teacher]).to(teacher_dtype)
    teacher = logits[0].to(dtype).double().tolist()
    hidden, head = identity(torch.tensor([student], dtype=dtype), biased=True)
    ids = torch.tensor([token])
    terms = token_terms(hidden, head, ids, lambda rows: logits[rows], temperature)
    log_p = log_softmax(torch.tensor(student, dtype=dtype).double().tolist(), temperature)
    scale = largest(student, teacher) / temperature
    assert_near(terms.kl.item(), defined_kl(student, teacher, temperature), scale)
    assert_near(terms.log_probs.item(), log_p[token], scale)
    assert_near(token_log_probs(hidden, head, ids, temperature).item(), log_p[token], scale)
    assert_near(terms.entropy.item(), -math.fsum(math.exp(a) * a for a in log_p if a > -math.inf), scale)
    if math.isfinite(terms.kl.item()) and math.isfinite(log_p[token]):
        one = torch.ones(1, dtype=dtype)
        fused = weighted_terms(hidden, head, ids, lambda rows: logits[rows], one, one, temperature)
        assert fused.kl.item() == terms.kl.item()
        (separate,) = torch.autograd.grad((terms.kl + terms.log_probs).sum(), hidden)
        (together,) = torch.autograd.grad(fused.loss, hidden)
        assert separate.isfinite().all()
        torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5 * (1 + scale))


@pytest.mark.slow
@FUZZED
@given(ROWS, ROWS, st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]), DTYPES, DTYPES)
def test_guided_logits_forbid_what_either_stream_forbids_and_are_never_nan(cond, uncond, scale, one, other):
    a, b = torch.tensor(cond).to(one), torch.tensor(uncond).to(other)
    guided = guide_logits(a, b, scale)
    assert guided.dtype == torch.promote_types(torch.promote_types(one, other), torch.float32)
    if scale in (0, 1):
        assert torch.equal(guided, (a if scale else b).to(guided.dtype))
        return
    assert not guided.isnan().any()
    forbidden = a.isneginf() | b.isneginf()
    assert guided[forbidden].isneginf().all()
    exact = b.double() + scale * (a.double() - b.double())
    near = ~forbidden & (exact.abs() < 1e30)
    bound = 1e-6 * (1 + a.double().abs() + b.double().abs()) * (1 + abs(scale)) * 4
    assert ((guided.double() - exact).abs() <= bound)[near].all()


LENGTHS = st.sampled_from([1e-44, 1e-38, 1e-30, 1e-19, 1e-8, 1.0, 1e8, 1e18, 1e20, 1e30, 3e38])
UNIT = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3).filter(lambda v: max(map(abs, v)) > 0.1)


@pytest.mark.slow
@FUZZED
@given(st.lists(st.tuples(UNIT, LENGTHS), min_size=4, max_size=4), DTYPES)
def test_directions_alone_make_diversity_however_long_the_vectors(vectors, dtype):
    rows = torch.stack([torch.tensor(v, dtype=torch.float64) * length for v, length in vectors]).to(dtype)
    if not rows.isfinite().all() or (rows == 0).all(-1).any():
        with pytest.raises(ValueError, match="no direction"):
            group_diversity(rows, 2)
        return
    exact = rows.double() / rows.double().abs().amax(-1, keepdim=True)
    for of, groups in ((group_diversity, 2), (group_diversity, 4), (diversity_advantages, 4)):
        torch.testing.assert_close(of(rows, groups).double(), of(exact, groups), rtol=1e-4, atol=1e-5)
