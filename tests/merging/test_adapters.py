"""Interpolation of adapters against the weights computed from them in float64, for every kind that PEFT can write."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model
from merge_worlds import assert_equal_bits, effective_weights, random_adapter, small_musicgen, tensors_of
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MusicgenForConditionalGeneration

from trl_drcd.merging import interpolate_adapters, interpolate_checkpoints, set_interpolation_weight
from trl_drcd.merging.verify import check_that_it_generates

ATTENTION, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tmp_path, tokenizer):
    """A small random Llama with biases in its attention."""
    make_model(tokenizer, attention_bias=True).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def weights_of(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Effective weights in float64 of a base with an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # some adapters begin in no other
    return effective_weights(PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double())


def assert_is_lerp(base: Path, merged: Path, adapters: list[Path], weights: list[float], tolerance: float = 1e-6):
    """Every effective weight of the merged adapter, reloaded, is the weighted sum of the parents'."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    untouched = {name.removesuffix(".weight"): tensor for name, tensor in model.state_dict().items()}
    parents = [weights_of(base, adapter) if adapter else None for adapter in adapters]
    result = weights_of(base, merged)
    changed = 0
    for name, tensor in result.items():
        short = name.removeprefix("base_model.model.").removesuffix(".weight")
        values = [untouched[short] if p is None else p[matching(p, name)] for p in parents]
        expected = sum(w * value for w, value in zip(weights, values, strict=True))
        assert (tensor - expected).abs().max() <= tolerance * expected.abs().max(), name
        changed += not torch.allclose(tensor, untouched.get(short, torch.zeros_like(tensor)), atol=1e-4)
    assert changed > 0


def matching(weights: dict[str, torch.Tensor], name: str) -> str:
    """A module's weight is called by the module's name where it is wrapped, by the parameter's where it is not."""
    return next(n for n in (name, name + ".weight", name.removesuffix(".weight")) if n in weights)


KINDS = {
    "ranks and alphas": ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 16}),
    "rank-stabilised": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "one rank-stabilised": ({"r": 4, "use_rslora": True}, {"r": 8}),
    "patterns": (
        {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"r": 2, "rank_pattern": {".*v_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 20}},
    ),
    "other modules": ({"target_modules": ATTENTION}, {"target_modules": ["v_proj", "up_proj"]}),
    "other layers": ({"target_modules": ALL, "layers_to_transform": [0]}, {"target_modules": ALL}),
    "a pattern of modules": ({"target_modules": r".*\.(q|v)_proj"}, {"target_modules": ATTENTION}),
    "biases of B": ({"lora_bias": True, "r": 4}, {"lora_bias": True, "lora_alpha": 16}),
    "biases of B in one": ({"lora_bias": True, "lora_alpha": 16}, {}),
    "biases of the base": ({"bias": "lora_only"}, {"bias": "lora_only", "r": 2}),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
    "saved modules": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "r": 2}),
    "embeddings": (
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 3},
        {"target_modules": ["embed_tokens", "lm_head"], "r": 2},
    ),
    "token rows": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3, 5], "r": 2}),
    "initialised otherwise": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}),
    "minor components": ({"init_lora_weights": "mica"}, {"init_lora_weights": "mica", "r": 2}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*embedding layers", "ignore:.*lora_bias")
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_lerp(base, tmp_path, kind):
    pair = [random_adapter(tmp_path / str(seed), base, seed, **settings) for seed, settings in enumerate(KINDS[kind])]
    errors = interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m")
    assert set(errors.values()) == {0.0}
    assert_is_lerp(base, tmp_path / "m", pair, [0.7, 0.3])


def test_by_hand(base, tmp_path):
    # alpha / sqrt(r) = 8 / 2, alpha / r = 16 / 2
    settings = ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 2, "lora_alpha": 16})
    pair = [random_adapter(tmp_path / str(seed), base, seed, **s) for seed, s in enumerate(settings)]
    interpolate_adapters(pair, [0.25, 0.75], tmp_path / "m")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (*pair, tmp_path / "m")]
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    for key in (key for key in files[2] if "lora_A" in key):
        q, d, m = (file[key.replace("lora_A", "lora_B")].double() @ file[key].double() for file in files)
        assert torch.allclose(m, 0.25 * 8 / 2 * q + 0.75 * 16 / 2 * d, rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize(("weights", "which"), [([1, 0], 0), ([0.0, 1.0], 1)])
def test_the_ends_come_back_bit_for_bit(base, tmp_path, weights, which):
    pair = [random_adapter(tmp_path / str(seed), base, seed, use_dora=True) for seed in range(2)]  # of any kind
    interpolate_adapters(pair, weights, tmp_path / "m")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (pair[which] / name).read_bytes()


def test_towards_the_base_and_three_adapters(base, tmp_path):
    three = [random_adapter(tmp_path / str(seed), base, seed, r=seed + 2) for seed in range(3)]
    interpolate_adapters([three[0], "base"], [0.7, 0.3], tmp_path / "m")
    assert_is_lerp(base, tmp_path / "m", [three[0], None], [0.7, 0.3])
    interpolate_adapters([*three, "base"], [0.2, 0.3, 0.4, 0.1], tmp_path / "n")
    assert_is_lerp(base, tmp_path / "n", [*three, None], [0.2, 0.3, 0.4, 0.1])
    with pytest.raises(ValueError, match=r"select only the base"):
        interpolate_adapters([three[0], "base"], [0, 1], tmp_path / "o")


def test_low_precision_adapters_are_stored_in_float32(base, tmp_path):
    pair = [random_adapter(tmp_path / str(seed), base, seed) for seed in range(2)]
    for folder in pair:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m")
    assert {t.dtype for t in load_file(tmp_path / "m" / "adapter_model.safetensors").values()} == {torch.float32}
    assert_is_lerp(base, tmp_path / "m", pair, [0.7, 0.3])


def test_svd_reports_its_error_and_is_the_best(base, tmp_path):
    settings = ({"r": 4, "target_modules": ALL}, {"r": 3, "target_modules": ATTENTION})
    pair = [random_adapter(tmp_path / str(seed), base, seed, **s) for seed, s in enumerate(settings)]
    errors = interpolate_adapters(pair, [0.4, 0.6], tmp_path / "m", svd_rank=4)
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["r"] == 4
    plain = {n.removesuffix(".weight"): t for n, t in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    q, d, m = (weights_of(base, folder) for folder in (*pair, tmp_path / "m"))
    plain = {name: tensor.detach() for name, tensor in plain.items()}
    lost = total = 0.0
    for name, error in errors.items():
        if name == "total":
            continue
        key = "base_model.model." + name
        w = plain[name].double()
        exact = 0.4 * q[key] + 0.6 * d[matching(d, key)] - w
        singular = torch.linalg.svdvals(exact)
        expected = float(singular[4:].norm() / singular.norm())
        assert math.isclose(error, expected, rel_tol=1e-4, abs_tol=1e-7), name
        assert math.isclose((m[key] - w - exact).norm() / exact.norm(), expected, rel_tol=1e-3, abs_tol=1e-6), name
        assert (error > 0) == ("q_proj" in name or "v_proj" in name)
        lost, total = lost + singular[4:].square().sum(), total + singular.square().sum()
    assert math.isclose(errors["total"], math.sqrt(lost / total), rel_tol=1e-5)
    assert f"Relative error of the weight changes: {errors['total']:.3g}" in (tmp_path / "m" / "README.md").read_text()
    assert interpolate_adapters(pair, [0.4, 0.6], tmp_path / "n", svd_rank=7)["total"] == 0.0


def test_merged_into_the_base(base, tmp_path):
    pair = [random_adapter(tmp_path / str(seed), base, seed, r=seed + 2) for seed in range(2)]
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m", base_model=base)
    assert not (tmp_path / "m" / "adapter_config.json").exists() and (tmp_path / "m" / "tokenizer.json").exists()
    merged, plain = tensors_of(tmp_path / "m"), tensors_of(base)
    q, d = (weights_of(base, folder) for folder in pair)
    for name, tensor in merged.items():
        key = "base_model.model." + name
        values = [w[matching(w, key)] for w in (q, d)]
        assert torch.allclose(tensor.double(), 0.7 * values[0] + 0.3 * values[1], atol=2e-7), name
        assert tensor.dtype == plain[name].dtype


@pytest.mark.parametrize(
    ("name", "value"), [("target_parameters", ["mlp.up_proj.weight"]), ("velora_config", {"scale": 2.0})]
)
def test_a_kind_whose_merge_is_not_known_is_refused(base, tmp_path, name, value):
    adapter = random_adapter(tmp_path / "a", base, 0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config[name] = value
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"`{name}=.*no exact merge into the base is known"):
        interpolate_adapters([adapter], [1.0], tmp_path / "m", base_model=base)


def test_dora_by_way_of_full_checkpoints(base, tmp_path):
    """What the refusal of DoRA advises gives the LERP of the weights."""
    pair = [random_adapter(tmp_path / str(seed), base, seed, use_dora=True) for seed in range(2)]
    with pytest.raises(ValueError, match=r"`use_dora=True`: DoRA rescales .*merge each adapter into the base first"):
        interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m")
    full = [tmp_path / "full0", tmp_path / "full1"]
    for adapter, folder in zip(pair, full, strict=True):
        interpolate_adapters([adapter], [1.0], folder, base_model=base)
    merged = tensors_of(interpolate_checkpoints(full, [0.7, 0.3], tmp_path / "m"))
    for name, tensor in merged.items():
        parts = []
        for adapter in pair:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload()
            parts.append(model.state_dict()[name])
        assert torch.allclose(tensor.double(), 0.7 * parts[0] + 0.3 * parts[1], atol=1e-6), name


TIED = {
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "an embedding, its head with it": (
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        False,
    ),
    "a saved head": ({"modules_to_save": ["lm_head"]}, False),
    "a saved embedding, its head with it": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "token rows": ({"trainable_token_indices": [3, 5]}, True),
    "attention alone": ({}, True),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings(tmp_path, tokenizer, kind):
    """Exact as an adapter; merged into the base only where one tensor can hold it (PEFT by itself merges all)."""
    settings, can_be_merged = TIED[kind]
    make_model(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    pair = [random_adapter(tmp_path / str(seed), tmp_path / "tied", seed, **settings) for seed in range(2)]
    if "modules_to_save" in settings and can_be_merged:  # the file has the tensor twice
        for folder in pair:
            tensors = load_file(folder / "adapter_model.safetensors")
            tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m")
    assert_is_lerp(tmp_path / "tied", tmp_path / "m", pair, [0.7, 0.3])
    if not can_be_merged:
        with pytest.raises(ValueError, match=r"ties its embedding and its head, .*the merge would change both"):
            interpolate_adapters(pair, [0.7, 0.3], tmp_path / "n", base_model=tmp_path / "tied")
        assert not (tmp_path / "n").exists()
        return
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "n", base_model=tmp_path / "tied")
    ids = torch.tensor([[1, 5, 3, 8]])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), tmp_path / "m").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "n").eval()
    assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-4)


REFUSED = {
    "saved modules in one": ({"modules_to_save": ["lm_head"]}, {}, "differ in `modules_to_save`"),
    "biases in one": ({"bias": "all"}, {}, "differ in `bias`"),
    "other token rows": (
        {"trainable_token_indices": [3]}, {"trainable_token_indices": [4]}, "differ in `trainable_token_indices`",
    ),
    "biases of B and an embedding": (
        {"lora_bias": True}, {"target_modules": ["embed_tokens"]}, "PEFT cannot load an adapter with both",
    ),
    "an embedding of one, and the base's copy with it": (
        {"target_modules": ["embed_tokens", "q_proj"]}, {}, "embed_tokens.base_layer.weight replaces a tensor",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa'.*also changes the base weights"),
    "activated": ({"alora_invocation_tokens": [3]}, {}, "activated LoRA depends on the tokens"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_exact_interpolation_is_refused(base, tmp_path, kind):
    *settings, message = REFUSED[kind]
    pair = [random_adapter(tmp_path / str(seed), base, seed, **s) for seed, s in enumerate(settings)]
    with pytest.raises(ValueError, match=message):
        interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saved_modules_have_no_interpolation_towards_the_base(base, tmp_path):
    adapter = random_adapter(tmp_path / "a", base, 0, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.weight replaces a tensor of the base, but base has no such tensor"):
        interpolate_adapters([adapter, "base"], [0.7, 0.3], tmp_path / "m")


def test_other_refusals(base, tmp_path, tokenizer):
    make_model(tokenizer, hidden_size=32).save_pretrained(tmp_path / "wide")
    pair = [random_adapter(tmp_path / "a", base, 0), random_adapter(tmp_path / "b", tmp_path / "wide", 0)]
    with (
        pytest.raises(ValueError, match=r"q_proj has different sizes .*\[\(16, 16\), \(32, 32\)\]"),
        pytest.warns(UserWarning, match="different base models .*llama.*wide"),
    ):
        interpolate_adapters(pair, [0.5, 0.5], tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"llama has no adapter_config.json"):
        interpolate_adapters([base, pair[0]], [0.5, 0.5], tmp_path / "m")
    with pytest.raises(ValueError, match="`svd_rank` must be at least 1, got 0"):
        interpolate_adapters(pair, [0.5, 0.5], tmp_path / "m", svd_rank=0)
    config = json.loads((pair[0] / "adapter_config.json").read_text())
    (pair[0] / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ValueError, match=r"q_proj of .* has rank 4; its adapter_config.json says 5"):
        interpolate_adapters([pair[0], "base"], [0.5, 0.5], tmp_path / "m")
    (pair[0] / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"is a .*IA3 adapter; only LoRA is supported"):
        interpolate_adapters([pair[0], "base"], [0.5, 0.5], tmp_path / "m")


def test_one_adapter_per_lambda_as_servers_read_it(base, tmp_path):
    """
    PEFT and vLLM: `adapter_config.json` with one rank, `adapter_model.safetensors` with nothing but factors.

    vLLM takes `r`, `lora_alpha` and `target_modules` from the configuration, applies `lora_alpha / r` everywhere (it
    knows no patterns), and refuses saved modules, biases and DoRA; `--max-lora-rank` must be `r` at least.
    """
    settings = ({"r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": False}, {"r": 4, "use_rslora": True})
    pair = [random_adapter(tmp_path / str(seed), base, seed, **s) for seed, s in enumerate(settings)]
    for step in range(5):
        weight = step / 4
        folder = tmp_path / f"lambda_{weight:.2f}"
        interpolate_adapters(pair, [1 - weight, weight], folder)
        if 0 < weight < 1:
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["r"] == config["lora_alpha"] == 8
            assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
            assert not config["modules_to_save"] and config["bias"] == "none" and not config["lora_bias"]
            assert not (
                config["use_dora"] or config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"]
            )
            tensors = load_file(folder / "adapter_model.safetensors")
            assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
            assert {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in tensors.items()} == {8}
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == str(base)
        assert {path.name for path in folder.iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "README.md", "merge.yaml"),
        }
        assert_is_lerp(base, folder, pair, [1 - weight, weight])


def test_musicgen_adapters(tmp_path):
    """As one adapter, in the base, and in memory: the same weights."""
    base = small_musicgen(tmp_path / "musicgen", 0)
    kind = {"model_class": MusicgenForConditionalGeneration, "task_type": None}
    targets = {"target_modules": r".*decoder.*\.(q_proj|v_proj)"}
    pair = [random_adapter(tmp_path / str(seed), base, seed, r=3 + seed, **kind, **targets) for seed in range(2)]
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "m", base_model=base)
    check_that_it_generates(tmp_path / "m")
    model = PeftModel.from_pretrained(MusicgenForConditionalGeneration.from_pretrained(base), pair[0], "quality")
    model.load_adapter(pair[1], "diversity")
    set_interpolation_weight(model, 0.3)
    in_memory = model.merge_and_unload(adapter_names=["quality", "diversity"]).state_dict()
    plain, merged = tensors_of(base), tensors_of(tmp_path / "m")
    q, d = products(pair[0], 8 / 3), products(pair[1], 8 / 4)
    assert len(q) == 4
    for name, tensor in merged.items():
        expected = plain[name].double() + (0.7 * q[name] + 0.3 * d[name] if name in q else 0)
        assert torch.allclose(tensor.double(), expected, atol=1e-6), name
        assert torch.allclose(in_memory[name], tensor, atol=1e-6), name


def products(adapter: Path, scaling: float) -> dict[str, torch.Tensor]:
    """`scaling * B @ A` of each module in float64, by the name of its weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    pairs = {key: key.replace("lora_A", "lora_B") for key in tensors if "lora_A" in key}
    names = {key: key.removeprefix("base_model.model.").replace("lora_A.", "") for key in pairs}
    return {names[a]: scaling * tensors[b].double() @ tensors[a].double() for a, b in pairs.items()}


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_adapters_both_ways(smollm2, tmp_path):
    """Two adapters of a real model: as one adapter, in the base, and as full checkpoints."""
    base = smollm2 / "smollm2"
    settings = ({"r": 8, "lora_alpha": 16}, {"r": 4, "lora_alpha": 32, "use_rslora": True})
    pair = [random_adapter(tmp_path / str(seed), base, seed, **s) for seed, s in enumerate(settings)]
    q, d = products(pair[0], 16 / 8), products(pair[1], 32 / 2)
    assert len(q) == 60
    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "adapter")
    changes = {name: 0.7 * q[name] + 0.3 * d[name] for name in q}
    for name, product in products(tmp_path / "adapter", 1.0).items():
        assert (product - changes[name]).norm() <= 1e-6 * changes[name].norm(), name

    interpolate_adapters(pair, [0.7, 0.3], tmp_path / "into", base_model=base)
    full = [tmp_path / "full0", tmp_path / "full1"]
    for adapter, folder in zip(pair, full, strict=True):
        interpolate_adapters([adapter], [1.0], folder, base_model=base)
    interpolate_checkpoints(full, [0.7, 0.3], tmp_path / "full")
    plain, into, mean = tensors_of(base), tensors_of(tmp_path / "into"), tensors_of(tmp_path / "full")
    assert plain.keys() == into.keys() == mean.keys()
    for name, tensor in plain.items():
        exact = tensor.double() + changes.get(name, 0)
        # bfloat16 keeps 8 bits: one rounding; and one of each parent and of their mean
        slack = 1e-6 * exact.abs().max()
        assert ((into[name].double() - exact).abs() <= 2**-8 * exact.abs() + slack).all(), name
        largest = torch.stack([tensor.double() + p.get(name, 0) for p in (q, d)]).abs().amax(0)
        assert ((mean[name].double() - exact).abs() <= 2**-7 * largest + slack).all(), name
    interpolate_adapters(pair, [0, 1], tmp_path / "end", base_model=base)
    assert_equal_bits(tensors_of(tmp_path / "end"), tensors_of(full[1]))


def test_the_base_of_an_adapter_is_not_overwritten(base, tmp_path):
    adapter = random_adapter(tmp_path / "a", base, 0)
    before = tensors_of(base)
    with pytest.raises(ValueError, match="contains the input model"):
        interpolate_adapters([adapter, "base"], [0.5, 0.5], base, overwrite=True)
    assert_equal_bits(tensors_of(base), before)


def test_what_does_not_load_replaces_nothing(base, tmp_path, monkeypatch):
    pair = [random_adapter(tmp_path / str(seed), base, seed) for seed in range(2)]
    interpolate_adapters(pair, [1, 0], tmp_path / "m")
    before = (tmp_path / "m" / "adapter_model.safetensors").read_bytes()

    def fails(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr("trl_drcd.merging.adapters.check_that_it_generates", fails)
    with pytest.raises(RuntimeError):
        interpolate_adapters(pair, [0, 1], tmp_path / "m", overwrite=True, verify=True)
    assert (tmp_path / "m" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("wide", [("norm", "lm_head"), ("embed_tokens",)])
def test_a_base_of_several_data_types_keeps_them(base, tmp_path, wide):
    stored = {n: t if any(one in n for one in wide) else t.bfloat16() for n, t in tensors_of(base).items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    pair = [random_adapter(tmp_path / str(seed), base, seed, target_modules=["q_proj"]) for seed in range(2)]
    interpolate_adapters(pair, [0.5, 0.5], tmp_path / "m", base_model=base)
    merged = tensors_of(tmp_path / "m")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in stored.items()}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in stored.items():
        assert torch.equal(tensor, merged[name]) == ("q_proj.weight" not in name), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_whole_tensors_of_two_data_types(base, tmp_path, order):
    pair = [random_adapter(tmp_path / str(seed), base, seed, modules_to_save=["lm_head"]) for seed in range(2)]
    tensors = load_file(pair[0] / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, pair[0] / "adapter_model.safetensors")
    interpolate_adapters([pair[i] for i in order], [0.5, 0.5], tmp_path / "m")
    merged, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("m", "1"))
    (name,) = (name for name in merged if "lm_head" in name)
    assert merged[name].dtype == torch.float32
    torch.testing.assert_close(merged[name], (tensors[name].bfloat16().float() + second[name]) / 2)


def test_biases_that_the_base_lacks_are_not_lost(base, tmp_path, tokenizer):
    adapter = random_adapter(tmp_path / "a", base, 0, bias="all")
    make_model(tokenizer).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"the base has no \S+\.bias"):
        interpolate_adapters([adapter], [1], tmp_path / "m", base_model=tmp_path / "plain")


def test_adapters_of_other_vocabularies_are_refused(base, tmp_path, tokenizer):
    pair = [random_adapter(tmp_path / str(seed), base, seed) for seed in range(2)]
    for folder in pair:
        tokenizer.save_pretrained(folder)
    file = pair[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["slow"], words["fast"] = words["fast"], words["slow"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"have different vocabularies, as at '(slow|fast)'"):
        interpolate_adapters(pair, [0.5, 0.5], tmp_path / "m")


def test_the_cards_example_runs_where_the_merge_ran(base, tmp_path, monkeypatch):
    """The base, too, may be recorded by a path from there."""
    monkeypatch.chdir(tmp_path)
    adapter = random_adapter(tmp_path / "a", base, 0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "llama"}))
    (adapter / "generation_config.json").write_text("{}")
    interpolate_adapters(["a", "base"], [0.5, 0.5], "outputs/merged")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "outputs/merged/README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
