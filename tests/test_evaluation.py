"""Sampling, likelihoods and diversity of `trl_drcd.evaluation`, against exact values."""

import itertools
from unittest import mock

import pytest
import torch

from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.evaluation.variety import diversity_between_prompts, diversity_within_prompts, per_prompt
from trl_drcd.policies import CausalLMPolicy

TEMPERATURE = 0.9


def step_log_probs(model, tokenizer, prompt: str, completion: list[int], guidance_scale: float) -> torch.Tensor:
    """Next-token log-probabilities `(S, V)`, the plain way: one sequence, whole logits, Eq. (1) on them."""
    logits = []
    for text in (prompt, ""):
        ids = tokenizer(text)["input_ids"]
        output = model(input_ids=torch.tensor([ids + completion])).logits[0].double()
        logits.append(output[len(ids) - 1 : -1])
    guided = guidance_scale * logits[0] + (1 - guidance_scale) * logits[1]
    return (guided / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("model_guidance", [1.0, 2.0])
@torch.no_grad()
def test_the_kl_along_samples_adds_up_to_the_kl_of_sequences(model, tokenizer, model_guidance):
    # sum_y p(y) sum_s KL_s(y) = sum_y p(y) log p(y)/q(y), over all sequences of two tokens (one after an eos)
    other = type(model)(model.config).eval()
    eos, vocabulary = model.config.eos_token_id, range(model.config.vocab_size)
    sequences = [[a, b] for a, b in itertools.product(vocabulary, vocabulary) if a != eos] + [[eos]]
    samples = Samples(["a slow tune"], sequences, len(sequences), seconds=1.0)
    terms = teacher_terms(
        model, other, tokenizer, samples, 3.0, temperature=TEMPERATURE, model_guidance_scale=model_guidance
    )
    log_p, log_q = (
        torch.stack([
            step_log_probs(m, tokenizer, "a slow tune", y, scale).gather(1, torch.tensor(y)[:, None]).sum()
            for y in sequences
        ])
        for m, scale in ((model, model_guidance), (other, 3.0))
    )  # fmt: skip
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    p = log_p.exp()
    assert float((p * terms.kl).sum()) == pytest.approx(float((p * (log_p - log_q)).sum()), rel=1e-4)
    assert float((p * terms.entropy).sum()) == pytest.approx(float(-(p * log_p).sum()), rel=1e-4)
    assert terms.tokens.tolist() == [len(y) for y in sequences]


def test_the_guided_base_has_no_kl_to_itself_and_batches_change_nothing(model, tokenizer):
    samples = sample_prompts(model, tokenizer, ["slow", "a fast tune for drum"], 3, 3.0, max_new_tokens=6)
    one = teacher_terms(model, model, tokenizer, samples, 3.0, model_guidance_scale=3.0)
    assert one.kl.abs().max() < 1e-5
    whole = teacher_terms(model, model, tokenizer, samples, 3.0)
    parts = teacher_terms(model, model, tokenizer, samples, 3.0, batch_size=1)
    assert whole.kl.min() > 1e-3
    torch.testing.assert_close(whole.kl, parts.kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("guidance", "of_a_copy"), [(1.0, 3), (3.0, 4)])
def test_the_base_reads_each_stream_once_where_it_is_the_teacher_too(model, tokenizer, guidance, of_a_copy):
    """Its copy reads them again, with equal terms."""
    samples = sample_prompts(model, tokenizer, ["slow", "a fast tune for drum"], 3, guidance, max_new_tokens=6)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    plain = CausalLMPolicy.hidden_states
    with mock.patch.object(CausalLMPolicy, "hidden_states", autospec=True, side_effect=plain) as read:
        shared = teacher_terms(model, model, tokenizer, samples, 3.0, model_guidance_scale=guidance)
        assert read.call_count == 2
        apart = teacher_terms(model, other, tokenizer, samples, 3.0, model_guidance_scale=guidance)
        assert read.call_count == 2 + of_a_copy
    assert torch.equal(shared.kl, apart.kl) and torch.equal(shared.entropy, apart.entropy)


def test_sampling_is_reproducible_and_leaves_the_random_state(model, tokenizer):
    state = torch.get_rng_state()
    first, again, other = (
        sample_prompts(model, tokenizer, ["a tune", "fast"], 2, max_new_tokens=5, batch_size=3, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.repeated_prompts == ["a tune", "a tune", "fast", "fast"]
    assert first.tokens_per_second == pytest.approx(sum(map(len, first.token_ids)) / first.seconds)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="at least 1"):
        sample_prompts(model, tokenizer, ["a tune"], 0)


def test_diversity_within_and_between_prompts():
    # prompt 1: two equal vectors; prompt 2: two at right angles; cosines between them: (1 + 0) / 2
    embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert diversity_within_prompts(embeddings, 2).tolist() == pytest.approx([0.0, 1.0])
    assert diversity_between_prompts(embeddings, 2)["mean"] == pytest.approx(0.5)
    assert per_prompt(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2).tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="two prompts"):
        diversity_between_prompts(embeddings, 4)
