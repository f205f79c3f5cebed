"""Families of causal LMs: what training scores against the model's own float64 forward, and what is refused."""

import copy

import pytest
import torch
from tiny import RIGHT, make

from trl_drcd.compat.dropout import turn_off_dropout
from trl_drcd.policies import CausalLMPolicy

PROMPTS = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 9, 10]])
COMPLETIONS = torch.tensor([[3, 8, 4, 12, 0, 0], [11, 3, 5, 9, 10, 7]])
PROMPT_MASK = (PROMPTS != 0).long()
COMPLETION_MASK = (COMPLETIONS != 0).long()


def own_log_probs(model, row):
    """Of one row without padding, by the whole model in float64."""
    prompt = PROMPTS[row][PROMPT_MASK[row].bool()][None]
    completion = COMPLETIONS[row][COMPLETION_MASK[row].bool()][None]
    ids = torch.cat([prompt, completion], dim=1)
    return model(ids).logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", RIGHT)
def test_what_training_scores_is_what_the_model_says(name):
    """Values and gradients; in training mode, every dropout of the configuration 0.3, padded on both sides."""
    model = make(name)
    reference = copy.deepcopy(model).double().eval()
    reference.set_experts_implementation("eager")  # torch's grouped products have no float64
    policy = CausalLMPolicy(None)
    policy.prepare(model)
    model.train()
    hidden = policy.hidden_states(model, PROMPTS, PROMPT_MASK, COMPLETIONS, COMPLETION_MASK)
    (head,) = policy.heads(model)
    scored = COMPLETION_MASK.bool()
    ours = head.logits(hidden[scored]).log_softmax(-1)
    theirs = torch.cat([own_log_probs(reference, row) for row in range(2)])
    assert theirs.std() > 0.05, "logits that are all alike would test nothing"
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = dict(reference.named_parameters())
    # Some gradients are 0, such as that of a key's bias, and rounding in ours
    rounding = 1e-4 * max(parameter.grad.norm() for parameter in expected.values() if parameter.grad is not None)
    for key, parameter in model.named_parameters():
        if (wanted := expected[key].grad) is None:
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        error = (parameter.grad.double() - wanted).norm() / wanted.norm().clamp(min=rounding)
        assert error < 1e-3, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "llama", "mistral"])
def test_functional_dropout_is_turned_off(name):
    model = make(name).train()
    twice = [model(PROMPTS[1:]).logits for _ in range(2)]
    assert not torch.equal(*twice), "no dropout would test nothing"
    turn_off_dropout(model)
    assert torch.equal(*(model(PROMPTS[1:]).logits for _ in range(2)))
