"""lambda in memory: exact, reversible, in milliseconds; adapters and full models."""

import time

import pytest
import torch
from conftest import make_model
from merge_worlds import random_adapter, small_musicgen, tensors_of, trained_music_model
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trl_drcd.merging import hold_checkpoints, interpolate_adapters, interpolate_checkpoints, set_interpolation_weight

SWEEP = [step / 20 for step in range(21)]


@pytest.fixture
def adapters(tmp_path, tokenizer):
    """A base and two adapters of different ranks, scalings, and modules, one with biases."""
    base = tmp_path / "llama"
    make_model(tokenizer).save_pretrained(base)
    quality = random_adapter(tmp_path / "quality", base, 0, r=4, use_rslora=True)
    diversity = random_adapter(tmp_path / "diversity", base, 1, r=2, target_modules=["v_proj", "up_proj"])
    return base, [quality, diversity]


def loaded(base, folders, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, folders[0], adapter_name="a0", autocast_adapter_dtype=False)
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}", autocast_adapter_dtype=False)
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor([[1, 5, 8, 4, 6, 7]])).logits


def test_a_sweep_of_adapters_is_what_the_written_adapters_compute(adapters, tmp_path):
    base, pair = adapters
    model = loaded(base, pair)
    ends = [logits(loaded(base, [folder])) for folder in pair]
    for weight in SWEEP:
        set_interpolation_weight(model, weight)
        folder = tmp_path / f"lambda_{weight:.2f}"
        interpolate_adapters(pair, [1 - weight, weight], folder)
        assert torch.allclose(logits(model), logits(loaded(base, [folder])), rtol=1e-5, atol=1e-6)
    for weight in (0, 0.3, 1, 0.7, 0, 1):
        set_interpolation_weight(model, weight)
        if weight in (0, 1):
            assert torch.equal(logits(model), ends[weight])


def test_adapters_against_the_weights(adapters):
    """Merged into the base in float64, the mixture is the base and both changes, weighted."""
    base, pair = adapters
    plain = loaded(base, pair).unload().state_dict()
    q, d = (loaded(base, [folder]).merge_and_unload().state_dict() for folder in pair)
    model = loaded(base, pair)
    set_interpolation_weight(model, 0.3)
    mixed = model.merge_and_unload(adapter_names=["a0", "a1"]).state_dict()
    assert mixed.keys() == plain.keys()
    for name, tensor in mixed.items():
        expected = 0.7 * q[name] + 0.3 * d[name]
        assert torch.allclose(tensor, expected, rtol=1e-12, atol=1e-14), name


def test_one_adapter_goes_towards_the_base_and_three_take_weights(adapters, tmp_path):
    base, pair = adapters
    model, plain = loaded(base, pair[:1]), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    before = logits(model)
    set_interpolation_weight(model, 1)
    assert torch.equal(logits(model), logits(plain))
    set_interpolation_weight(model, 0)
    assert torch.equal(logits(model), before)

    three = [*pair, random_adapter(tmp_path / "third", base, 2)]
    model = loaded(base, three)
    set_interpolation_weight(model, [0.2, 0.3, 0.5])
    interpolate_adapters(three, [0.2, 0.3, 0.5], tmp_path / "m")
    assert torch.allclose(logits(model), logits(loaded(base, [tmp_path / "m"])), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`weight=0.3` needs exactly two ends, but there are 3; give 3 weights"):
        set_interpolation_weight(model, 0.3)


def test_adapters_that_are_refused(adapters, tmp_path):
    base, pair = adapters
    dora = random_adapter(tmp_path / "dora", base, 0, use_dora=True)
    with pytest.raises(ValueError, match=r"adapter 'a1' has `use_dora=True`: DoRA rescales"):
        set_interpolation_weight(loaded(base, [pair[0], dora]), 0.3)
    saved = random_adapter(tmp_path / "saved", base, 0, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"adapter 'a0' replaces tensors .*`modules_to_save=\['lm_head'\]`"):
        set_interpolation_weight(loaded(base, [saved, pair[1]]), 0.3)
    model = loaded(base, pair)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weights; call `unmerge_adapter\(\)` first"):
        set_interpolation_weight(model, 0.3)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0 and 1, got"):
            set_interpolation_weight(loaded(base, pair), wrong)
    with pytest.raises(ValueError, match="nothing to interpolate; load two LoRA adapters, or call `hold_checkpoints`"):
        set_interpolation_weight(torch.nn.Linear(2, 2), 0.3)


def test_a_sweep_of_a_trained_music_model_is_what_the_written_folders_hold(tmp_path):
    pair = [trained_music_model(tmp_path / name, seed) for seed, name in enumerate(("quality", "diversity"))]
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    hold_checkpoints(model, pair)
    for weight in SWEEP:
        set_interpolation_weight(model, weight)
        if weight in (0.0, 0.3, 0.5, 1.0):
            folder = interpolate_checkpoints(pair, [1 - weight, weight], tmp_path / f"{weight}")
            own, written = model.state_dict(), tensors_of(folder)
            assert all(torch.equal(own[name], tensor) for name, tensor in written.items())
            assert own["lm_head.weight"].data_ptr() == own["model.embed_tokens.weight"].data_ptr()  # still tied
    set_interpolation_weight(model, 0)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors_of(pair[0]).items())


def test_state_dicts_and_musicgen(tmp_path):
    pair = [small_musicgen(tmp_path / name, seed) for seed, name in enumerate("ab")]
    from transformers import MusicgenForConditionalGeneration

    models = [MusicgenForConditionalGeneration.from_pretrained(folder) for folder in pair]
    model = MusicgenForConditionalGeneration.from_pretrained(pair[0])
    hold_checkpoints(model, [m.state_dict() for m in models])
    set_interpolation_weight(model, 0.25)
    states = [m.state_dict() for m in models]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, 0.75 * states[0][name] + 0.25 * states[1][name], atol=1e-6), name
    set_interpolation_weight(model, [0.0, 1.0])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in model.state_dict().items())


def test_ends_that_do_not_fit_are_refused(tokenizer):
    model, ends = make_model(tokenizer), [make_model(tokenizer, seed).state_dict() for seed in range(2)]
    with pytest.raises(ValueError, match=r"the model has lm_head.weight of shape .*a state dict has no such tensor"):
        hold_checkpoints(model, [ends[0], {k: v for k, v in ends[1].items() if k != "lm_head.weight"}])
    with pytest.raises(ValueError, match=r"has the shape \(3,\)"):
        hold_checkpoints(model, [ends[0], ends[1] | {"model.norm.weight": torch.zeros(3)}])


def test_a_change_of_lambda_takes_milliseconds(adapters):
    base, pair = adapters
    model = loaded(base, pair)
    set_interpolation_weight(model, 0)
    start = time.process_time()
    for weight in SWEEP:
        set_interpolation_weight(model, weight)
    assert (time.process_time() - start) / len(SWEEP) < 0.1  # measured: recipes/README.md


def test_ends_without_a_configuration_are_held_too(tmp_path):
    """A module of one's own, and folders with safetensors alone."""
    model, ends = torch.nn.Linear(2, 2), []
    model.config = {"of": "one's own"}
    for value in (1.0, 3.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        ends.append(folder)
        tensors = {name: torch.full_like(p, value) for name, p in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
    hold_checkpoints(model, ends)
    set_interpolation_weight(model, 0.5)
    assert all(torch.equal(p, torch.full_like(p, 2.0)) for p in model.state_dict().values())


def test_ends_that_compute_otherwise_are_refused(tmp_path, tokenizer):
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "one")
    other = make_model(tokenizer, 1)
    other.config.rope_parameters["rope_theta"] = 100.0
    other.save_pretrained(tmp_path / "other")
    hold_checkpoints(model, [tmp_path / "one"] * 2)
    with pytest.raises(ValueError, match=r"architectures: `rope_parameters.rope_theta`"):
        hold_checkpoints(model, [tmp_path / "one", tmp_path / "other"])
    tied = make_model(tokenizer)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"are one tensor in the model, but have two values in a state dict"):
        hold_checkpoints(tied, [state])


def test_adapters_are_frozen_even_if_they_were_trained(adapters):
    base, pair = adapters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), pair[0], is_trainable=True)
    set_interpolation_weight(model, 0.5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    own = AutoModelForCausalLM.from_pretrained(base)
    own.load_adapter(str(pair[0]))
    with pytest.raises(ValueError, match="load them with `PeftModel`"):
        set_interpolation_weight(own, 0.5)
