"""The terms whose gradient comes along with them, against those that are differentiated one by one."""

import pytest
import torch

from trl_drcd.losses import Head, token_terms, weighted_terms


def problem(tokens=7, **head):
    torch.manual_seed(0)
    states, weight, bias, teacher = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((tokens, 5), (11, 5), (11,), (tokens, 11))
    )
    parameters = [tensor.requires_grad_() for tensor in (states, weight, bias)]
    weights = torch.randn(2, tokens, dtype=torch.float64)
    return parameters, Head(weight, bias, **head), torch.randint(11, (tokens,)), lambda rows: teacher[rows], weights


@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"scale": 1.7, "softcap": 1.5}])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_weighted_terms_equal_token_terms(head, rows):
    """Values and gradients, for any chunk size and any factor that the loss is scaled by afterwards."""
    parameters, head, ids, teacher, weights = problem(**head)
    terms = token_terms(parameters[0], head, ids, teacher, 0.9)
    loss = (weights[0] * terms.kl + weights[1] * terms.log_probs).sum()
    expected = torch.autograd.grad(loss / 8, parameters)

    ours = weighted_terms(parameters[0], head, ids, teacher, *weights, 0.9, logits_per_chunk=rows * 11)
    actual = torch.autograd.grad(ours.loss / 8, parameters)
    for mine, theirs in zip((*ours, *actual), (loss, *terms, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    assert not any(term.requires_grad for term in ours[1:])


def test_gradients_of_weighted_terms_are_the_finite_differences():
    parameters, _, ids, teacher, weights = problem()

    def loss(states, weight, bias):
        return weighted_terms(states, Head(weight, bias), ids, teacher, *weights, 0.99, logits_per_chunk=33).loss

    assert torch.autograd.gradcheck(loss, parameters)


def test_a_frozen_head_gets_no_gradient():
    (states, *frozen), head, ids, teacher, weights = problem()
    for parameter in frozen:
        parameter.requires_grad_(False)
    weighted_terms(states, head, ids, teacher, *weights).loss.backward()
    assert states.grad is not None and head.weight.grad is None and head.bias.grad is None


def test_no_tokens_is_a_differentiable_nothing():
    (states, *_), head, ids, teacher, weights = problem()
    terms = weighted_terms(states[:0], head, ids[:0], teacher, *weights[:, :0])
    terms.loss.backward()
    assert terms.loss == 0 and terms.kl.shape == (0,) and head.weight.grad.abs().sum() == 0
