"""The decode loop with a static cache and compiled steps: the same samples, and steps that are compiled once."""

import gc
import shutil
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from accelerate.utils import DistributedType
from families import CONFIGS, make, policy
from peft import LoraConfig
from test_loop import NEGATIVES, PROMPTS, STEPS, TEMPERATURE, check_scores, scored
from test_musicgen import make_musicgen, t5_tokenizer  # noqa: F401
from test_trainer import make_model, make_trainer, rollout
from transformers import MistralConfig, MistralForCausalLM

from trl_drcd.policies import policy_for
from trl_drcd.sampling import CausalStream, compiled, static_cache, static_cache_refusal
from trl_drcd.validation.launch import check_launch

FULL = ["llama, grouped keys", "gpt2", "opt, no position_ids", "bloom, alibi", "qwen2"]


@pytest.fixture
def traced(monkeypatch):
    """Graphs that dynamo traced; they run as they are, without the minute that inductor takes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("trl_drcd.validation.once_loaded.shutil.which", lambda name: name)  # no compiler is needed
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("name", FULL)
def test_what_is_sampled_is_what_is_scored(name, traced):
    """Padding, shared prompts, sequences that end early; also after a rollout whose cache is used again."""
    model = make(name)
    with static_cache():
        for seed in range(2):
            check_scores(model, seed=seed)
        for negatives in NEGATIVES.values():
            check_scores(model, 3.0, negatives)
    assert traced


def test_the_same_samples_and_nothing_compiled_twice(traced):
    model = make("qwen2").double()
    for scale in (1.0, 3.0):
        drawn, counts = [], []
        for use in (False, True, True):
            torch.manual_seed(1)
            with static_cache(use):
                drawn.append(policy().rollout(model, PROMPTS, NEGATIVES["own"], scale, TEMPERATURE, STEPS))
            counts.append(len(traced))
        assert torch.equal(drawn[0].ids, drawn[1].ids) and torch.equal(drawn[0].ids, drawn[2].ids)
        torch.testing.assert_close(drawn[0].log_probs, drawn[2].log_probs, rtol=0, atol=1e-12)
        assert counts[0] < counts[1] == counts[2]


def test_weights_that_changed_are_the_ones_that_sample(traced):
    model = make("qwen2")
    with static_cache():
        check_scores(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        check_scores(model)


def test_under_autocast_keys_and_values_have_different_types(traced):
    model = make("llama, grouped keys")
    with torch.autocast("cpu", torch.bfloat16), static_cache():
        rollout = policy().rollout(model, PROMPTS, max_new_tokens=STEPS)
    expected = scored(model, rollout, None, 1.0)
    found = rollout.log_probs[..., 0] * TEMPERATURE  # bfloat16 rounds
    assert (found.exp().sum() - (expected * TEMPERATURE).exp().sum()).abs() < 3 and rollout.finite.all()


def test_prompts_of_other_lengths_compile_nothing_anew(traced):
    model, counts = make("qwen2"), []
    with static_cache():
        for length in (1, 9, 30):
            policy().rollout(model, [[1] * length] * 3, max_new_tokens=STEPS)
            counts.append(len(traced))
        policy().rollout(model, [[1] * 90] * 3, max_new_tokens=STEPS)  # beyond the next multiple of 64
    assert counts[0] == counts[1] == counts[2] < len(traced)


def test_more_sizes_than_dynamo_compiles_of_one_function(traced):
    """Each has a function of its own; only the latest are kept."""
    model = make("qwen2")
    with static_cache(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in range(1, 12):
            policy().rollout(model, [[1, 5]] * rows, max_new_tokens=3)
            assert len(traced) == rows and len(compiled._steps[model.base_model]) == min(rows, compiled.KEPT)
        policy().rollout(model, [[1, 5]] * 11, max_new_tokens=3)
    assert len(traced) == 11


def test_a_rollout_that_is_not_finite_leaves_nothing_to_the_next(traced):
    model = make("qwen2")
    weights = model.base_model.layers[0].self_attn.k_proj.weight
    before = weights.detach().clone()
    with static_cache(), torch.no_grad():
        weights.fill_(torch.nan)
        assert not policy().rollout(model, PROMPTS, max_new_tokens=STEPS).finite.any()
        weights.copy_(before)
        assert policy().rollout(model, PROMPTS, max_new_tokens=3).finite.all()


def test_a_model_that_is_gone_leaves_nothing_behind(traced):
    model = make("qwen2")
    gone = weakref.ref(model.base_model)
    gc.collect()
    before = len(compiled._steps)  # of models that other tests keep
    with static_cache():
        policy().rollout(model, PROMPTS, max_new_tokens=STEPS)
    assert len(compiled._steps) == before + 1
    del model
    gc.collect()
    assert gone() is None and len(compiled._steps) == before


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FULL])
def test_layers_with_a_past_of_their_own_are_refused(name):
    model = make(name)
    reason = static_cache_refusal(model.config)
    assert "layers that keep their past otherwise" in reason
    with static_cache(), pytest.raises(ValueError, match="`cache_implementation=static`"):
        policy().rollout(model, PROMPTS, max_new_tokens=STEPS)
    assert static_cache_refusal(make("qwen2").config) is None


def test_outside_of_it_nothing_is_compiled(traced):
    with static_cache():
        pass
    check_scores(make("qwen2"))
    with static_cache(False):
        assert not CausalStream(make("qwen2").base_model, PROMPTS, STEPS).fixed_rows
    assert not traced


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
@pytest.mark.parametrize("family", ["causal LM", "MusicGen"])
def test_compiled_by_inductor(family, t5_tokenizer):  # noqa: F811
    """The real compiler, as on a GPU but for the CUDA graphs."""
    model = make("llama, grouped keys") if family == "causal LM" else make_musicgen()
    own = policy() if family == "causal LM" else policy_for(model, t5_tokenizer)
    given = {"temperature": TEMPERATURE, "max_new_tokens": 8}
    torch.compiler.reset()
    drawn = []
    for use in (False, True):
        torch.manual_seed(1)
        with static_cache(use):
            drawn.append(own.rollout(model, [[1, 5], [1, 5], [1]], [[1], [1], [1, 4, 3]], 3.0, **given))
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    torch.testing.assert_close(drawn[0].log_probs, drawn[1].log_probs, rtol=0, atol=1e-4)
    torch.compiler.reset()


# ---------------------------------------------------------------- trainer


def rollouts(tmp_path, model, tokenizer, **options):
    """Completions of two rollouts of a trainer."""
    torch.manual_seed(3)
    trainer = make_trainer(tmp_path, tokenizer, model, **options)
    return [rollout(trainer)["completion_ids"] for _ in range(2)]


def test_a_trainer_with_a_static_cache_samples_the_same(tmp_path, tokenizer, traced):
    model = make_model(tokenizer)
    plain = rollouts(tmp_path / "plain", model, tokenizer)
    assert not traced
    static = rollouts(tmp_path / "static", model, tokenizer, cache_implementation="static", allowed_token_ids=None)
    assert traced and all(map(torch.equal, plain, static))


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_compiles_nothing_anew(tmp_path, tokenizer, traced, lora):
    """TRL turns it off and on around each rollout, and transformers adds a hook to the embeddings each time."""
    options = {"peft_config": LoraConfig(target_modules="all-linear", lora_dropout=0.0)} if lora else {}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        make_model(tokenizer),
        cache_implementation="static",
        gradient_checkpointing=True,
        **options,
    )
    counts = []
    for _ in range(10):
        rollout(trainer)
        counts.append(len(traced))
    assert counts[1] == counts[-1]


def test_a_trainer_refuses_it_where_it_cannot_work(tmp_path, tokenizer, traced):
    config = make_model(tokenizer).config.to_dict() | {"sliding_window": 3, "model_type": "mistral"}
    windows = MistralForCausalLM(MistralConfig(**config))
    with pytest.raises(ValueError, match="`cache_implementation=static` is not supported for MistralForCausalLM: it"):
        make_trainer(tmp_path, tokenizer, windows, cache_implementation="static")
    with mock.patch("shutil.which", lambda name: None), pytest.raises(ValueError, match=r"with a C\+\+ compiler"):
        make_trainer(tmp_path, tokenizer, cache_implementation="static")
    trainer = make_trainer(tmp_path, tokenizer, cache_implementation="static")
    sharded = mock.Mock(distributed_type=DistributedType.FSDP)
    with (
        mock.patch("trl_drcd.validation.launch.check_sharding"),
        mock.patch("trl_drcd.validation.launch.check_clipping"),
        pytest.raises(ValueError, match="`cache_implementation=static` does not work with sharded weights"),
    ):
        check_launch(trainer.args, sharded, 1, False)
