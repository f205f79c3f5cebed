"""The decode loop against teacher-forced scores, exact probabilities and `generate`, of several architectures."""

import logging
from unittest import mock

import pytest
import torch
from families import CONFIGS, EOS, OTHERS, PAD, VOCABULARY, make, policy
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.utils.logging import warning_once

from trl_drcd.guidance import EarlySteps, generate_guided
from trl_drcd.losses import guided_logits
from trl_drcd.sampling import CausalStream, PreallocatedLayer, Rollout, decode, loop, preallocated_cache, refusal

TEMPERATURE, STEPS = 0.9, 6
# Equal prompts and unequal lengths; a negative prompt that all share, and one of each
PROMPTS = [[1, 5, 6, 4], [1, 5, 6, 4], [1, 8, 9, 10, 11, 12, 7, 4], [1, 4], [1, 4], [1, 4]]
NEGATIVES = {"shared": [[1, 4]] * 6, "own": [[1, 4], [3], [1, 11, 5, 4], [1, 4, 7, 6, 9, 4], [1, 4], [3, 3]]}


@torch.no_grad()
def scored(model, rollout, negatives, guidance_scale):
    """Log-probabilities of the sampled tokens, `(B, S)`, from one forward per row and stream: no cache, no padding."""
    rows = []
    for number, ids in enumerate(rollout.completions()):
        completion = torch.tensor([ids])
        streams = [None, None]
        for stream, prompts in enumerate([PROMPTS, negatives] if negatives else [PROMPTS]):
            prompt = torch.tensor([prompts[number]])
            masks = torch.ones_like(prompt), torch.ones_like(completion)
            streams[stream] = policy().hidden_states(model, prompt, masks[0], completion, masks[1])[0]
        logits = guided_logits(policy().heads(model)[0], *streams, guidance_scale)(slice(None))
        log_p = (logits / TEMPERATURE).log_softmax(-1).gather(1, completion.T)[:, 0]
        rows.append(torch.nn.functional.pad(log_p, (0, rollout.ids.shape[1] - len(ids))))
    return torch.stack(rows)


def check_scores(model, guidance_scale=1.0, negatives=None, seed=0):
    torch.manual_seed(seed)
    rollout = policy().rollout(model, PROMPTS, negatives, guidance_scale, TEMPERATURE, STEPS)
    expected = scored(model, rollout, negatives, guidance_scale)
    torch.testing.assert_close(rollout.log_probs[..., 0], expected, rtol=0, atol=1e-5)
    lengths = torch.tensor([len(ids) for ids in rollout.completions()])
    assert torch.equal(rollout.drawn[..., 0], torch.arange(rollout.ids.shape[1]) < lengths[:, None])
    assert (rollout.ids[~rollout.drawn] == PAD).all() and rollout.finite.all()
    return rollout


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_what_is_sampled_is_what_is_scored(name):
    """Padding, shared prompts, sequences that end early, a cache per step: no difference to a plain forward."""
    model = make(name)
    rollouts = [check_scores(model, seed=seed).drawn.sum((1, 2)) for seed in range(3)]
    assert any(lengths.min() < lengths.max() for lengths in rollouts), "no sequence ended before the others"
    for negatives in NEGATIVES.values():
        check_scores(model, 3.0, negatives)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_decoded_by_the_loop(name):
    model = make(name)
    assert refusal(model) is None
    kinds = {type(layer) for layer in CausalStream(model.base_model, [[1]], 2).cache.layers}
    own = {type(layer) for layer in DynamicCache(config=model.config).layers}
    assert len(kinds) == len(own) and kinds & own == own - {PreallocatedLayer.__base__}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "MambaModel does not keep its past in a `Cache`"),
        ("gpt", "OpenAIGPTModel does not keep its past in a `Cache`"),
        ("phi3", "Phi3ForCausalLM overrides `prepare_inputs_for_generation`"),
    ],
)
def test_what_it_cannot_feed_samples_by_generate_and_says_why(name, reason, caplog):
    model = make(name)
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING), mock.patch.object(type(model), "generate", autospec=True) as generate:
        generate.side_effect = InterruptedError
        with pytest.raises(InterruptedError):
            policy().rollout(model, PROMPTS)
    assert refusal(model) == reason
    assert f"Sampling goes through `generate`, which is slower: {reason}." in caplog.messages


def test_lora_adapters_take_part(tmp_path):
    model = make("llama, grouped keys")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    with_adapter = check_scores(adapted)
    with adapted.disable_adapter():
        without = check_scores(adapted)
    assert not torch.equal(with_adapter.log_probs[:, 0], without.log_probs[:, 0])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sequences_are_drawn_from_the_exact_distribution(guidance_scale):
    """Every completion of two tokens, of 10,000 samples, against the product of its probabilities: chi-squared."""
    model, prompt, negative, count = make("llama, grouped keys"), [1, 5, 6, 4], [1, 4], 10_000
    with torch.no_grad():

        def log_probs(*start):
            streams = [model(torch.tensor([p + list(start)])).logits[0, -1] for p in (prompt, negative)]
            guided = streams[1] + guidance_scale * (streams[0] - streams[1])
            return (guided / TEMPERATURE).log_softmax(-1)

        first = log_probs()
        joint = torch.stack([first[i] + log_probs(i) for i in range(VOCABULARY)])
        joint[EOS] = -torch.inf
        joint[EOS, PAD] = first[EOS]  # it ends
    torch.manual_seed(1)
    rollout = policy().rollout(model, [prompt] * count, [negative] * count, guidance_scale, TEMPERATURE, 2)
    ids = rollout.ids[..., 0]
    seen = torch.zeros(VOCABULARY, VOCABULARY).index_put_((ids[:, 0], ids[:, 1]), torch.ones(count), accumulate=True)
    expected = joint.exp() * count
    rare = expected < 5
    assert rare.sum() < VOCABULARY**2 - 20, "nothing left to compare"
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    degrees = len(expected) - 1
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sequences_that_leave_the_batch_change_no_other(guidance_scale, monkeypatch):
    """Dropped as soon as a quarter has ended, or never: the same tokens of the same random state."""
    model, kept = make("gpt2"), []
    own = CausalStream.keep
    monkeypatch.setattr(CausalStream, "keep", lambda self, rows: (kept.append(len(rows)), own(self, rows)))
    rollouts = []
    for share in (loop.ENDED_SHARE, 2.0):
        monkeypatch.setattr(loop, "ENDED_SHARE", share)
        torch.manual_seed(4)
        rollouts.append(
            policy().rollout(model, PROMPTS * 4, NEGATIVES["own"] * 4, guidance_scale, TEMPERATURE, 3 * STEPS)
        )
    rows = 24 * (1 + (guidance_scale != 1))
    assert kept.count(rows) == 2, "each reads the different prompts once"
    assert len(kept) > 3 and min(kept) < rows
    assert torch.equal(rollouts[0].ids, rollouts[1].ids)
    torch.testing.assert_close(rollouts[0].log_probs, rollouts[1].log_probs, rtol=0, atol=1e-5)


def test_guided_samples_are_those_of_generate():
    """The same random state, as long as no sequence ends."""
    model = make("llama, grouped keys")
    model.generation_config.eos_token_id = None
    rollouts = []
    for sample in (policy().rollout, generate_guided):
        torch.manual_seed(2)
        rollouts.append(sample(model, PROMPTS, NEGATIVES["own"], 3.0, TEMPERATURE, STEPS))
    assert torch.equal(rollouts[0].ids[..., 0], rollouts[1])


@pytest.mark.parametrize("early", [None, EarlySteps(2), EarlySteps(3, 0.5), EarlySteps(STEPS)])
def test_generate_draws_the_same_where_the_loop_cannot(early):
    """Codes, log-probabilities with and without early steps, of one random state."""
    model = make("llama, grouped keys")
    model.generation_config.eos_token_id = None
    torch.manual_seed(2)
    loop = policy().rollout(model, PROMPTS, NEGATIVES["own"], 3.0, TEMPERATURE, STEPS, [], early=early)
    with mock.patch("trl_drcd.policies.causal_lm.refusal", lambda model: "told to"):
        torch.manual_seed(2)
        other = policy().rollout(model, PROMPTS, NEGATIVES["own"], 3.0, TEMPERATURE, STEPS, [], early=early)
    torch.manual_seed(2)
    guided = generate_guided(model, PROMPTS, NEGATIVES["own"], 3.0, TEMPERATURE, STEPS, early)
    assert torch.equal(loop.ids, other.ids) and torch.equal(loop.ids[..., 0], guided)
    torch.testing.assert_close(loop.log_probs, other.log_probs, rtol=0, atol=1e-4)


def inputs_of(model) -> list[dict]:
    """What its backbone will have been called with."""
    calls = []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_each_different_prompt_is_read_once():
    model = make("llama, grouped keys")
    calls = inputs_of(model)
    policy().rollout(model, PROMPTS, NEGATIVES["shared"], 3.0, TEMPERATURE, 2, [])
    # The negative prompt is one of the prompts, too
    assert [call["input_ids"].shape for call in calls] == [(3, 8), (12, 1)]


def test_no_mask_is_made_where_nothing_is_padded():
    model = make("llama, grouped keys")
    calls = inputs_of(model)
    policy().rollout(model, [[1, 4], [5, 6]], max_new_tokens=3, eos_token_ids=[])
    assert [call["attention_mask"] for call in calls] == [None] * 3


def test_completions_end_with_their_last_step():
    ids = torch.tensor([[[5], [2], [0]], [[5], [6], [7]], [[2], [0], [0]]])
    drawn = torch.tensor([[[1], [1], [0]], [[1], [1], [1]], [[1], [0], [0]]]).bool()
    assert Rollout(ids, torch.zeros(3, 3, 1), drawn, torch.ones(3)).completions() == [[5, 2], [5, 6, 7], [2]]
    # A codebook that begins a step late, another that ends a step early
    ids, drawn = torch.tensor([[[5, 8], [6, 7], [8, 4]]]), torch.tensor([[[1, 0], [1, 1], [0, 1]]]).bool()
    assert Rollout(ids, torch.zeros(1, 3, 2), drawn, torch.ones(1)).completions() == [[5, 8, 6, 7, 8, 4]]


def test_only_allowed_tokens_are_drawn_from_their_own_distribution():
    model, allowed = make("llama, grouped keys"), torch.tensor([3, 5, 7, 11])
    torch.manual_seed(0)
    stream = CausalStream(model.model, PROMPTS, STEPS)
    rollout = decode(stream, policy().heads(model), STEPS, token_ids=allowed)
    assert torch.isin(rollout.ids, allowed).all() and rollout.drawn.all()
    with torch.no_grad():
        log_p = model(torch.tensor(PROMPTS[:1])).logits[0, -1, allowed].log_softmax(-1)
    assert rollout.log_probs[0, 0, 0] == pytest.approx(log_p[allowed == rollout.ids[0, 0, 0]].item(), abs=1e-5)


def test_a_row_that_is_not_finite_is_named_and_harms_no_other():
    model = make("llama, grouped keys")

    def poison(module, args, output):
        if output.shape[1] == 1:
            output[2] = torch.nan
        return output

    handle = model.model.norm.register_forward_hook(poison)
    torch.manual_seed(0)
    bad = policy().rollout(model, PROMPTS, max_new_tokens=STEPS, eos_token_ids=[])
    handle.remove()
    torch.manual_seed(0)
    good = policy().rollout(model, PROMPTS, max_new_tokens=STEPS, eos_token_ids=[])
    assert bad.finite.tolist() == [True, True, False, True, True, True]
    assert torch.equal(bad.ids[bad.finite], good.ids[bad.finite])
    assert bad.ids[2].max() < VOCABULARY and len(set(bad.ids[2].flatten().tolist())) > 1


class Casts(TorchDispatchMode):
    """Counts the casts of matrices to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].dim() == 2:
            self.count += kwargs.get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast_weights_are_cast_once_frozen_ones_too(trained):
    model = make("llama, grouped keys").requires_grad_(trained)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        torch.manual_seed(0)
        rollout = policy().rollout(model, PROMPTS, max_new_tokens=STEPS, eos_token_ids=[])
    assert casts.count == sum(isinstance(module, torch.nn.Linear) for module in model.model.modules())
    assert all(p.requires_grad is trained for p in model.parameters())
    torch.testing.assert_close(rollout.log_probs[..., 0], scored(model, rollout, None, 1.0), rtol=0, atol=0.3)


def test_each_module_gets_its_mode_back():
    model = make("llama, grouped keys").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    policy().rollout(model, PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_checkpointing_in_training_mode_changes_nothing():
    model, samples = make("llama, grouped keys"), []
    model.gradient_checkpointing_enable()
    for training in (False, True):
        torch.manual_seed(0)
        samples.append(policy().rollout(model.train(training), PROMPTS, max_new_tokens=STEPS).completions())
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"guidance_scale": 3.0}, r"needs `negative_prompt_ids` with one entry per prompt \(6\), got None"),
        ({"prompt_ids": [[1], []]}, "at least one token each, got none in row 1"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_what_is_refused(name, changed, message):
    if name == "mamba" and "prompt_ids" in changed:
        return
    with pytest.raises(ValueError, match=message):
        policy().rollout(make(name), **({"prompt_ids": PROMPTS} | changed))


def test_the_cache_holds_as_many_positions_as_it_was_given():
    cache = preallocated_cache(make("llama, grouped keys").config, 3)
    keys = torch.randn(2, 1, 2, 8)
    cache.update(keys, -keys, 0)
    assert cache.get_seq_length() == 2 and cache.get_mask_sizes(1, 0) == (3, 0)
    held = cache.layers[0].keys
    more = torch.randn(2, 1, 1, 8)
    keys_now, values_now = cache.update(more, -more, 0)
    assert keys_now.data_ptr() == held.data_ptr(), "nothing was copied"
    assert torch.equal(keys_now, torch.cat([keys, more], 2)) and torch.equal(values_now, -keys_now)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.layers[0].keys, keys_now[[1, 1, 0]])
    with pytest.raises(ValueError, match="room for 3 positions, got 4"):
        cache.update(more, more, 0)
