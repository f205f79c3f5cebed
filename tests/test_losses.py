"""The KL against its definition, the chunked terms against dense float64, and their gradients."""

import pytest
import torch

from trl_drcd.losses import Head, policy_gradient_loss, reverse_kl, sum_per_sequence, token_log_probs, token_terms


def test_reverse_kl_is_its_definition():
    # p = softmax([ln 2, 0] / 2), q = softmax([0, ln 3] / 2), by hand: p = (sqrt 2, 1) / (1 + sqrt 2), ...
    p = torch.tensor([2**0.5, 1.0], dtype=torch.float64) / (1 + 2**0.5)
    q = torch.tensor([1.0, 3**0.5], dtype=torch.float64) / (1 + 3**0.5)
    student = torch.tensor([2.0, 1.0], dtype=torch.float64).log()
    teacher = torch.tensor([1.0, 3.0], dtype=torch.float64).log()
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=2.0), expected, rtol=1e-12, atol=0)


def test_reverse_kl_of_equal_models_is_zero_and_otherwise_positive():
    torch.manual_seed(0)
    logits, other = torch.randn(6, 11), torch.randn(6, 11)
    assert reverse_kl(logits, logits).abs().max() < 1e-6
    assert reverse_kl(logits, logits + 5.0).abs().max() < 1e-6  # a constant changes no distribution
    assert (reverse_kl(logits, other) > 0).all()


def test_reverse_kl_where_tokens_are_forbidden():
    student, teacher = torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])
    torch.testing.assert_close(reverse_kl(student, teacher), torch.tensor(2.0).log())
    assert reverse_kl(teacher, student).isinf()


def test_reverse_kl_refuses_two_vocabularies_and_no_temperature():
    with pytest.raises(ValueError, match="same vocabulary"):
        reverse_kl(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        reverse_kl(torch.zeros(2, 5), torch.zeros(2, 5), temperature=0)


def random_problem(tokens=7, hidden=5, vocabulary=11, dtype=torch.float64, **head):
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,))
    teacher = torch.randn(tokens, vocabulary, dtype=dtype)
    return states, Head(weight, bias, **head), ids, teacher


HEADS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 1.5}]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunked_terms_equal_dense_ones(head, rows):
    """Values and gradients, for any chunk size, against autograd through the dense logits in float64."""
    states, head, ids, teacher = random_problem(**head)
    temperature = 0.9
    weights = torch.randn(2, len(ids), dtype=torch.float64)
    logits = head.logits(states)
    log_probs = (logits / temperature).log_softmax(-1)
    dense = (
        reverse_kl(logits, teacher, temperature),
        log_probs.gather(1, ids[:, None])[:, 0],
        -(log_probs.exp() * log_probs).sum(-1),
    )
    parameters = (states, head.weight, head.bias)
    expected = torch.autograd.grad((weights[0] * dense[0] + weights[1] * dense[1]).sum(), parameters)

    terms = token_terms(states, head, ids, lambda chunk: teacher[chunk], temperature, logits_per_chunk=rows * 11)
    actual = torch.autograd.grad((weights[0] * terms.kl + weights[1] * terms.log_probs).sum(), parameters)
    for ours, theirs in zip((*terms, *actual), (*dense, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_finite_differences_of_the_joint_loss():
    """`torch.autograd.gradcheck` of distillation plus policy gradient, through the chunked backward."""
    states, head, ids, teacher = random_problem()
    advantages = torch.tensor([0.7, -0.4], dtype=torch.float64)
    mask = torch.ones(2, 4, 1, dtype=torch.bool)
    mask[1, 3] = False  # 7 tokens in two sequences

    def joint(states, weight, bias):
        terms = token_terms(states, Head(weight, bias), ids, lambda c: teacher[c], 0.99, logits_per_chunk=33)
        distillation = sum_per_sequence(terms.kl, mask).mean()
        return distillation + 15 * policy_gradient_loss(sum_per_sequence(terms.log_probs, mask), advantages)

    assert torch.autograd.gradcheck(joint, (states, head.weight, head.bias))


def test_no_gradient_reaches_the_teacher_and_none_is_needed_for_a_frozen_head():
    states, head, ids, teacher = random_problem()
    teacher.requires_grad_()
    frozen = Head(head.weight.detach(), head.bias.detach())
    terms = token_terms(states, frozen, ids, lambda chunk: teacher[chunk])
    terms.kl.sum().backward()
    assert states.grad is not None and teacher.grad is None
    assert not terms.entropy.requires_grad


def test_two_vocabularies_are_refused():
    states, head, ids, teacher = random_problem()
    with pytest.raises(ValueError, match="same vocabulary, got 11 and 10"):
        token_terms(states, head, ids, lambda chunk: teacher[chunk, :10])


def test_no_tokens_is_a_differentiable_nothing():
    states, head, _, _ = random_problem()
    terms = token_terms(states[:0], head, torch.zeros(0, dtype=torch.long), lambda chunk: chunk)
    assert terms.kl.shape == (0,)
    sum_per_sequence(terms.kl, torch.zeros(2, 3, 1, dtype=torch.bool)).sum().backward()
    assert head.weight.grad.abs().sum() == 0
    assert head.bias.grad.abs().sum() == 0  # there, for the processes that wait for it


def test_sum_per_sequence_follows_the_mask():
    mask = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]], dtype=torch.bool)
    assert sum_per_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0]), mask).tolist() == [7.0, 8.0, 0.0]


def test_policy_gradient_loss_and_its_surrogate_share_a_gradient_at_the_sampling_policy():
    log_probs = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    loss = policy_gradient_loss(log_probs, advantages)
    assert loss.item() == pytest.approx(-(2 * -3 + -1 * -5) / 2)
    (plain,) = torch.autograd.grad(loss, log_probs)
    (clipped,) = torch.autograd.grad(policy_gradient_loss(log_probs, advantages, log_probs.detach()), log_probs)
    torch.testing.assert_close(plain, clipped)


def test_surrogate_clips_a_ratio_that_has_moved():
    old = torch.zeros(1)
    log_probs = torch.tensor([1.0], requires_grad=True)
    loss = policy_gradient_loss(log_probs, torch.tensor([1.0]), old, 0.2, 0.2)
    assert loss.item() == pytest.approx(-1.2)
    assert torch.autograd.grad(loss, log_probs)[0].item() == 0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_log_probs_alone_are_those_of_the_terms(head, rows):
    states, head, ids, teacher = random_problem(**head)
    expected = token_terms(states, head, ids, lambda chunk: teacher[chunk], 0.9).log_probs
    dense = (head.logits(states) / 0.9).log_softmax(-1)[torch.arange(len(ids)), ids]
    found = token_log_probs(states, head, ids, 0.9, logits_per_chunk=rows * 11)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, dense.detach(), rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    nothing = token_log_probs(states[:0].bfloat16(), head, ids[:0])
    assert nothing.shape == (0,) and nothing.dtype == torch.float32
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        token_log_probs(states, head, ids, 0)


def test_the_log_prob_of_a_forbidden_token_is_minus_infinity():
    head = Head(torch.zeros(2, 1), torch.tensor([0.0, -torch.inf]))
    assert token_log_probs(torch.zeros(2, 1), head, torch.tensor([0, 1])).tolist() == [0.0, -torch.inf]
