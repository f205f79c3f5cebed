"""Prompts that rows share go through the model once: the same hidden states and gradients as one forward on all."""

import copy

import pytest
import torch
from tiny import RIGHT, make

from trl_drcd.policies import CausalLMPolicy, causal_lm
from trl_drcd.policies.shared_prompts import distinct_prompts, shared_refusal

PROMPTS = torch.tensor([[0, 0, 1, 5, 6]] * 3 + [[1, 7, 8, 9, 10]] * 3)
COMPLETIONS = torch.tensor(
    [[3, 8, 4, 12, 0, 0], [11, 3, 5, 9, 10, 7], [4, 0, 0, 0, 0, 0], [9, 3, 0, 0, 0, 0], [5, 6, 7, 8, 3, 9], [3] * 6]
)
ROWS = PROMPTS, (PROMPTS != 0).long(), COMPLETIONS, (COMPLETIONS != 0).long()


def hidden_and_gradients(model, rows):
    policy = CausalLMPolicy(None)
    policy.prepare(model)
    hidden = policy.hidden_states(model.train(), *rows)[rows[3].bool()]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
    (hidden * weights).sum().backward()
    return hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RIGHT)
def test_hidden_states_and_gradients_are_those_of_one_forward(name, monkeypatch):
    model = make(name).double()
    model.set_experts_implementation("eager")  # torch's grouped products have no float64
    plain_model = copy.deepcopy(model)
    if shared_refusal(model.train()) is not None:
        pytest.skip(shared_refusal(model))
    shared, gradients = hidden_and_gradients(model, ROWS)
    monkeypatch.setattr(causal_lm, "shared_refusal", lambda model: "asked for")
    plain, expected = hidden_and_gradients(plain_model, ROWS)
    torch.testing.assert_close(shared, plain, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() < 1e-6 * scale, key


def test_the_prompt_goes_through_the_model_once(monkeypatch):
    model, seen = make("llama"), []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    CausalLMPolicy(None).hidden_states(model, *ROWS)
    assert seen == [(2, 5), (6, 5)]
    seen.clear()
    alone = [part[::3] for part in ROWS]  # different prompts share nothing
    CausalLMPolicy(None).hidden_states(model, *alone)
    assert seen == [(2, 10)]


def test_distinct_prompts_look_at_ids_and_mask():
    ids = torch.tensor([[0, 5], [0, 5], [0, 6], [0, 5]])
    mask = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1]])
    first, index = distinct_prompts(ids, mask)
    assert first.tolist() == [0, 2, 3] and index.tolist() == [0, 0, 1, 2]


def test_it_falls_back_by_name():
    assert "without full attention" in shared_refusal(make("mistral"))
    assert "ALiBi" in shared_refusal(make("bloom"))
    model = make("llama").train()
    assert shared_refusal(model) is None
    model.gradient_checkpointing_enable()
    assert "gradient checkpointing" in shared_refusal(model)
    with torch.no_grad():
        assert "gradient checkpointing" in shared_refusal(model)
    assert shared_refusal(model.eval()) is None
    assert "compiled" in shared_refusal(torch.compile(model, backend="eager"))
