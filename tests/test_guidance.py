"""Guidance: the equation, its equality before and after the head, and sampling with two streams in one batch."""

import pytest
import torch
from conftest import make_model
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from trl_drcd.guidance import (
    TeacherCFGLogitsProcessor,
    ancestral_generation_config,
    generate_guided,
    guide_hidden_states,
    guide_logits,
    left_pad,
)


def test_guide_logits_is_equation_1():
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    # 3 * cond + (1 - 3) * uncond
    torch.testing.assert_close(guide_logits(cond, uncond, 3.0), torch.tensor([2.0, 0.0]))


def test_guidance_of_one_is_exactly_the_conditional_teacher():
    cond, uncond = torch.randn(4, 7), torch.randn(4, 7) * 1e6
    assert torch.equal(guide_logits(cond, uncond, 1.0), cond)
    assert torch.equal(guide_hidden_states(cond, uncond, 1.0), cond)


def test_guided_hidden_state_projects_to_guided_logits_bias_included():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 31, dtype=torch.float64)
    cond, uncond = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for scale in (1.0, 3.0, 7.0):
        before = head(guide_hidden_states(cond, uncond, scale))
        after = guide_logits(head(cond), head(uncond), scale)
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_low_precision_is_combined_in_float32():
    cond, uncond = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    guided = guide_logits(cond, uncond, 3.0)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, 3 * cond.float() - 2 * uncond.float(), rtol=1e-6, atol=1e-6)


def test_a_forbidden_token_stays_forbidden():
    cond, uncond = torch.tensor([0.0, -torch.inf, 1.0]), torch.tensor([0.0, -torch.inf, -torch.inf])
    assert guide_logits(cond, uncond, 3.0).tolist() == [0.0, -torch.inf, -torch.inf]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        guide_logits(torch.zeros(2, 3), torch.zeros(2, 4), 3.0)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_one_doubled_batch_equals_two_separate_unpadded_passes(model, tokenizer, scale):
    """Left padding, unequal lengths and the other rows of the batch change no distribution."""
    prompts = tokenizer(["a slow tune for flute", "drum", "fast harp"])["input_ids"]
    negatives = tokenizer(["", "slow", ""])["input_ids"]
    completion = [[5, 9], [7, 7], [12, 6]]
    ids, mask = left_pad([p + c for p, c in zip(prompts + negatives, completion * 2, strict=True)], 0)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, -1]
    ours = TeacherCFGLogitsProcessor(scale).guided_log_probs(logits)
    for i in range(3):
        cond = model(torch.tensor([prompts[i] + completion[i]])).logits[0, -1].log_softmax(-1)
        theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            scale, model, unconditional_ids=torch.tensor([negatives[i] + completion[i]]), use_cache=False
        )(torch.tensor([prompts[i] + completion[i]]), cond[None])[0].log_softmax(-1)
        torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-5)


def test_generate_guided_samples_from_the_guided_distribution(model, tokenizer):
    """The first token's frequencies over many samples, within four standard errors of the exact probabilities."""
    prompt, negative = tokenizer("slow harp")["input_ids"], tokenizer("")["input_ids"]
    count, temperature = 4000, 0.99
    cond = model(torch.tensor([prompt])).logits[0, -1]
    uncond = model(torch.tensor([negative])).logits[0, -1]
    expected = (guide_logits(cond, uncond, 2.0) / temperature).softmax(-1)
    torch.manual_seed(0)
    sampled = generate_guided(model, [prompt] * count, [negative] * count, 2.0, temperature, max_new_tokens=1)
    assert sampled.shape == (count, 1)
    frequencies = torch.bincount(sampled[:, 0], minlength=len(expected)) / count
    error = 4 * (expected * (1 - expected) / count).sqrt() + 1e-3
    assert ((frequencies - expected).abs() < error).all()


def test_generate_guided_ignores_the_models_own_sampling_settings(model, tokenizer):
    """A greedy, truncating, guided generation config of the model must not leak into ancestral sampling."""
    prompt = tokenizer("slow harp")["input_ids"]
    model.generation_config.update(do_sample=False, top_k=1, repetition_penalty=5.0, guidance_scale=4.0, min_p=0.9)
    before = model.generation_config.to_dict()
    torch.manual_seed(0)
    sampled = generate_guided(model, [prompt] * 500, max_new_tokens=1)
    assert len(sampled.unique()) > 3
    assert model.generation_config.to_dict() == before


def test_generate_guided_pads_after_eos(tokenizer):
    model = make_model(tokenizer, seed=3)
    prompt = tokenizer("slow harp")["input_ids"]
    torch.manual_seed(0)
    rows = generate_guided(model, [prompt] * 64, [prompt] * 64, 3.0, max_new_tokens=12)
    ended = [row for row in rows.tolist() if 2 in row]
    assert ended and all(set(row[row.index(2) + 1 :]) <= {0} for row in ended)


def test_guidance_without_negative_prompts_is_refused(model):
    with pytest.raises(ValueError, match=r"`guidance_scale=3.0` needs `negative_prompt_ids`"):
        generate_guided(model, [[1, 4]], None, 3.0)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        TeacherCFGLogitsProcessor(3.0, temperature=0)


def test_ancestral_generation_config_is_neutral(model):
    model.generation_config.update(top_k=7, top_p=0.3, typical_p=0.2, guidance_scale=3.0, eos_token_id=[2, 3])
    model.generation_config.pad_token_id = None
    config = ancestral_generation_config(model.generation_config, 0.99)
    assert (config.top_k, config.top_p, config.typical_p, config.guidance_scale) == (0, 1.0, 1.0, 1.0)
    assert config.do_sample and config.temperature == 0.99
    assert config.eos_token_id == [2, 3] and config.pad_token_id == 2
