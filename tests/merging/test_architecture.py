"""What must agree between the models of a merge, what may differ, and what the merged model then gets."""

import json

import pytest
import torch
from conftest import make_model
from merge_worlds import assert_lerp, small_musicgen, tensors_of
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForCausalLM

from trl_drcd.merging import interpolate_checkpoints, merge_with_mergekit

pytestmark = pytest.mark.filterwarnings("ignore:.*has a cosine similarity of", "ignore:.*is_gradient_checkpointing")


def edit(folder, name="config.json", remove=(), **changes):
    file = folder / name
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


@pytest.fixture
def base_and_tuned(tmp_path, tokenizer):
    """A base that sets no padding token, and its fine-tuning, which does, as TRL leaves it."""
    base = make_model(tokenizer, 0)
    base.save_pretrained(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / "base", name, remove=("pad_token_id",))
    tuned = make_model(tokenizer, 0)
    with torch.no_grad():
        tuned.model.norm.weight += 0.5
    tuned.config.eos_token_id = tuned.generation_config.eos_token_id = [2, 3]
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize("merge", [interpolate_checkpoints, pytest.param(merge_with_mergekit, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", ["base", "tuned"])
def test_a_model_is_merged_with_its_base(base_and_tuned, tmp_path, merge, first):
    pair = list(base_and_tuned if first == "base" else base_and_tuned[::-1])
    with pytest.warns(UserWarning, match=r"different special tokens: `eos_token_id` is .*, from "):
        merged = merge(pair, [0.5, 0.5], tmp_path / "m", verify=True)
    assert_lerp(merged, pair, [0.5, 0.5], tolerance=2.4e-7)
    model = AutoModelForCausalLM.from_pretrained(merged)
    eos = 2 if first == "base" else [2, 3]  # both set it: the first one's
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0  # one sets it
    assert model.config.eos_token_id == model.generation_config.eos_token_id == eos
    card = (merged / "README.md").read_text()
    assert "## Special tokens" in card and "| pad_token_id | 0 | tuned | base has none |" in card


def test_the_base_by_the_word_base(base_and_tuned, tmp_path, monkeypatch):
    base, tuned = base_and_tuned
    moved = base.rename(tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"`models\[1\]=base` stands for the base model that the others record, .*none"
    ):
        interpolate_checkpoints([tuned, "base"], [0.5, 0.5], tmp_path / "m")
    (tuned / "README.md").write_text(f"---\nbase_model: {moved}\n---\n")
    with pytest.warns(UserWarning, match="eos_token_id"):
        merged = interpolate_checkpoints([tuned, "base"], [0.5, 0.5], tmp_path / "m")
    assert_lerp(merged, [tuned, moved], [0.5, 0.5])
    moved.rename(base)  # a folder of that name is that folder
    with pytest.warns(UserWarning, match="eos_token_id"):
        assert_lerp(interpolate_checkpoints([tuned, "base"], [0.25, 0.75], "n"), [tuned, base], [0.25, 0.75])


@pytest.mark.parametrize(
    "entry",
    [
        *({"attention_dropout": 0.1}, {"resid_pdrop": 0.1}, {"layerdrop": 0.1}, {"initializer_range": 0.5}),
        *({"use_cache": False}, {"temperature": 0.5}, {"max_length": 7}, {"top_k": 3}, {"pretraining_tp": 2}),
        *({"id2label": {"0": "x"}}, {"router_aux_loss_coef": 0.1}, {"dtype": "bfloat16"}),
        *({"problem_type": "regression"}, {"_name_or_path": "x"}, {"transformers_version": "4.0"}),
        {"tokenizer_class": "X"},
    ],
    ids=str,
)  # fmt: skip
def test_training_and_sampling_may_differ(base_and_tuned, tmp_path, entry):
    edit(base_and_tuned[1], eos_token_id=2, **entry)
    interpolate_checkpoints(base_and_tuned, [0.5, 0.5], tmp_path / "m")


@pytest.mark.parametrize(
    "entry",
    [
        *({"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"num_key_value_heads": 1}, {"head_dim": 4}),
        *({"tie_word_embeddings": True}, {"attention_bias": True}, {"max_position_embeddings": 17}),
        *({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"token_dropout": True}),
        {"image_token_id": 3},
        *({"final_logit_softcapping": 30.0}, {"sliding_window": 5}, {"architectures": ["LlamaModel"]}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_computed_may_not(base_and_tuned, tmp_path, entry):
    edit(base_and_tuned[1], eos_token_id=2, **entry)
    with pytest.raises(ValueError, match=f"different architectures: `{next(iter(entry))}"):
        interpolate_checkpoints(base_and_tuned, [0.5, 0.5], tmp_path / "m")


def test_a_padding_token_that_decides_positions_may_not(tmp_path):
    """RoBERTa counts positions from the padding id on: another id is another computation."""
    config = RobertaConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True,
        max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    edit(tmp_path / "b", pad_token_id=4)
    ids = torch.tensor([[5, 6, 7]])
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in "ab"]
    assert not torch.allclose(*logits)
    with pytest.raises(ValueError, match=r"different architectures: `pad_token_id` is 1 in .*/a and 4 in"):
        interpolate_checkpoints([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")
    edit(tmp_path / "b", pad_token_id=1, bos_token_id=None)
    interpolate_checkpoints([tmp_path / "b", tmp_path / "a"], [0.5, 0.5], tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["bos_token_id"] == 0


def test_special_tokens_of_a_part(tmp_path, tokenizer):
    pair = [small_musicgen(tmp_path / name, seed, tokenizer) for seed, name in enumerate("ab")]
    content = json.loads((pair[0] / "config.json").read_text())
    content["text_encoder"]["eos_token_id"] = None
    (pair[0] / "config.json").write_text(json.dumps(content))
    merged = interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m", verify=True)
    assert json.loads((merged / "config.json").read_text())["text_encoder"]["eos_token_id"] == 1


def test_a_generation_config_that_transformers_would_not_save(base_and_tuned, tmp_path):
    """Published ones set a temperature without sampling: it is kept, and its merge does not fail at the end."""
    base, tuned = base_and_tuned
    edit(tuned, eos_token_id=2)
    edit(base, "generation_config.json", temperature=0.5, do_sample=False)
    merged = interpolate_checkpoints([base, tuned], [0.5, 0.5], tmp_path / "m")
    generation = json.loads((merged / "generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"], generation["guidance_scale"]) == (0.5, False, 1.0)
    assert generation["pad_token_id"] == 0
    assert tensors_of(merged).keys() == tensors_of(base).keys()
