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
from test_loop import NEGATIVES, PROMPTS, STEPS, TEMPERATURE, check_scores
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


def test_a_trainer_refuses_it_for_other_layers_and_sharded_weights(tmp_path, tokenizer):
    config = make_model(tokenizer).config.to_dict() | {"sliding_window": 3, "model_type": "mistral"}
    windows = MistralForCausalLM(MistralConfig(**config))
    with pytest.raises(ValueError, match="`cache_implementation=static` is not supported for MistralForCausalLM: it"):
        make_trainer(tmp_path, tokenizer, windows, cache_implementation="static")
    trainer = make_trainer(tmp_path, tokenizer, cache_implementation="static")
    sharded = mock.Mock(distributed_type=DistributedType.FSDP)
    with (
        mock.patch("trl_drcd.validation.launch.check_sharding"),
        mock.patch("trl_drcd.validation.launch.check_clipping"),
        pytest.raises(ValueError, match="`cache_implementation=static` does not work with sharded weights"),
    ):
        check_launch(trainer.args, sharded, 1, False)
