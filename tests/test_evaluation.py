"""Sampling, metrics and the page of `trl_drcd.evaluation`, against exact values."""

import itertools

import numpy as np
import pytest
import torch

from trl_drcd.evaluation.metrics import (
    bootstrap_interval,
    diversity_between_prompts,
    diversity_within_prompts,
    interval_of,
    per_prompt,
    resampled_means,
    teacher_terms,
)
from trl_drcd.evaluation.report import comparison_page
from trl_drcd.evaluation.sampling import Samples, sample_prompts
from trl_drcd.policies.causal_lm import cut_after_eos

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


def test_completions_end_with_their_first_eos():
    ids = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2]])
    assert cut_after_eos(ids, 2) == [[5, 2], [5, 6, 7, 8], [2]]
    assert cut_after_eos(ids, [6, 2]) == [[5, 2], [5, 6], [2]]
    assert cut_after_eos(ids, None) == ids.tolist()


def test_bootstrap_interval_of_a_known_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values)
    # The interval of a mean: 1.96 * s / sqrt(n) to each side
    half = 1.96 * values.std() / 20
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval([2.0] * 9 + [np.nan]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval([])


def test_bootstrap_intervals_are_paired():
    before = np.random.default_rng(1).normal(10.0, 5.0, 50)
    shift = bootstrap_interval((before - 1) - before)
    assert (shift["low"], shift["high"]) == pytest.approx((-1, -1))
    halved = bootstrap_interval(np.stack([before / 2, before], 1), lambda v: 1 - v[:, 0].mean() / v[:, 1].mean())
    assert list(halved.values()) == pytest.approx([0.5, 0.5, 0.5])


def test_means_over_training_seeds_and_prompts():
    generator = np.random.default_rng(0)
    one = generator.normal(size=(1, 60))
    # One training: the interval over prompts
    assert interval_of(resampled_means(one)) == pytest.approx(bootstrap_interval(one[0]))
    # Prompts without noise: only the seeds are drawn, 27 of 3 ** 3, so the ends are those of all-the-lowest
    seeds = np.array([[0.0], [1.0], [5.0]]) * np.ones((3, 60))
    interval = interval_of(resampled_means(seeds))
    assert (interval["mean"], interval["low"], interval["high"]) == pytest.approx((2, 0, 5))
    # The variance of a crossed mean: that of the prompts / P, and that of the seeds / R, by their empirical values
    both = generator.normal(size=(8, 1)) + generator.normal(size=(1, 60))
    expected = both.mean(1).var() / 8 + both.mean(0).var() / 60
    assert resampled_means(both, resamples=20000)[1:].var() == pytest.approx(expected, rel=0.05)
    # What is missing is left out
    gap = one.copy()
    gap[0, 0] = np.nan
    assert resampled_means(gap)[0] == pytest.approx(one[0, 1:].mean())
    with pytest.raises(ValueError, match=r"shape \(R, P\), none of them 0, got \(60,\)"):
        resampled_means(one[0])


def test_diversity_within_and_between_prompts():
    # prompt 1: two equal vectors; prompt 2: two at right angles; cosines between them: (1 + 0) / 2
    embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert diversity_within_prompts(embeddings, 2).tolist() == pytest.approx([0.0, 1.0])
    assert diversity_between_prompts(embeddings, 2)["mean"] == pytest.approx(0.5)
    assert per_prompt(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2).tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="two prompts"):
        diversity_between_prompts(embeddings, 4)


def test_the_page_escapes_text_and_holds_sound_and_images():
    pytest.importorskip("soundfile")
    pytest.importorskip("matplotlib")
    tone = torch.sin(torch.arange(4000) / 5)
    evil = "<script>alert('&')</script>"
    table = (["", evil], [[evil, evil]])
    page = comparison_page(
        evil, evil, {"": table, evil: table}, [evil, "b"], {evil: [evil, "text"], "music": [(tone, 8000)] * 2}
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") >= 8
    assert page.count("data:audio/wav;base64,UklGR") == 2  # "RIFF"
    assert page.count("data:image/png;base64,iVBORw0KGgo") == 2
    with pytest.raises(ValueError, match="one for each of 2"):
        comparison_page("", "", {"": table}, ["a", "b"], {"short": ["x"]})
