"""Interpolation of full checkpoints: every tensor, every refusal, memory, and folders that are whole or absent."""

import copy
import json
import re
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model
from huggingface_hub import ModelCard
from merge_worlds import assert_equal_bits, assert_lerp, one_shard, small_musicgen, tensors_of, trained_music_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.merging import checkpoints, interpolate_checkpoints, merge_with_mergekit
from trl_drcd.merging.blend import blend, check_weights
from trl_drcd.merging.verify import check_that_it_generates


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Two trained tiny-music models."""
    folder = tmp_path_factory.mktemp("music")
    return [trained_music_model(folder / name, seed) for seed, name in enumerate(("quality", "diversity"))]


@pytest.fixture
def pair(tmp_path, tokenizer):
    """Two small random Llamas of one architecture, with tokenizers."""
    for seed, name in enumerate("ab"):
        make_model(tokenizer, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


pytestmark = pytest.mark.filterwarnings("ignore:.*do they come from one initialisation")  # random ones do not


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.5], [1.4, -0.4]])
def test_every_tensor_of_trained_music_models(music, tmp_path, weights):
    assert interpolate_checkpoints(music, weights, tmp_path / "m", verify=True) == tmp_path / "m"
    assert_lerp(tmp_path / "m", music, weights)


@pytest.mark.parametrize(("weights", "which"), [([1, 0], 0), ([0.0, 1.0], 1)])
def test_the_ends_come_back_bit_for_bit(music, tmp_path, weights, which):
    interpolate_checkpoints(music, weights, tmp_path / "m")
    assert_equal_bits(tensors_of(tmp_path / "m"), tensors_of(music[which]))


def test_the_folder_of_a_music_model_is_complete(music, tmp_path):
    merged = interpolate_checkpoints(music, [0.5, 0.5], tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {
        *("README.md", "codec", "config.json", "generation_config.json", "merge.yaml", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert not [path.name for path in tmp_path.iterdir() if path.name != "merged"]
    tokens = SpectralCodec.from_pretrained(merged / "codec").decode([[0]])
    assert tokens[0][1] == 16000
    text = pipeline("text-generation", model=str(merged))("a slow reel for flute", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("a slow reel for flute")
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.guidance_scale == 1.0


def test_four_models_and_one_model(pair, tmp_path, tokenizer):
    for seed, name in ((2, "c"), (3, "d")):
        make_model(tokenizer, seed).save_pretrained(tmp_path / name)
    four = [*pair, tmp_path / "c", tmp_path / "d"]
    assert_lerp(interpolate_checkpoints(four, [0.25] * 4, tmp_path / "m"), four, [0.25] * 4)
    assert_equal_bits(tensors_of(interpolate_checkpoints(pair[:1], [1], tmp_path / "n")), tensors_of(pair[0]))


def test_shards_stay_shards(pair, tmp_path):
    for folder in pair:
        model = AutoModelForCausalLM.from_pretrained(folder)
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="4KB")
    merged = interpolate_checkpoints(pair, [0, 1], tmp_path / "m", verify=True)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert_equal_bits(dict(AutoModelForCausalLM.from_pretrained(merged).state_dict()), whole)


def test_a_single_shard_keeps_its_index(pair, tmp_path):
    """`model-00001-of-00001.safetensors`, which nothing finds without one."""
    for folder in pair:
        one_shard(folder)
    merged = interpolate_checkpoints(pair, [0, 1], tmp_path / "m", verify=True)
    expected = AutoModelForCausalLM.from_pretrained(pair[1]).state_dict()
    assert_equal_bits(dict(AutoModelForCausalLM.from_pretrained(merged).state_dict()), dict(expected))


def test_low_precision_is_summed_in_float32_and_rounded_once(tmp_path, tokenizer):
    for seed, name in enumerate("ab"):
        make_model(tokenizer, seed).bfloat16().save_pretrained(tmp_path / name)
    parents = [tmp_path / "a", tmp_path / "b"]
    a, b = map(tensors_of, parents)
    merged = tensors_of(interpolate_checkpoints(parents, [0.7, 0.3], tmp_path / "m"))
    wide = tensors_of(interpolate_checkpoints(parents, [0.7, 0.3], tmp_path / "w", dtype="float32"))
    for name in a:
        exact = 0.7 * a[name].double() + 0.3 * b[name].double()
        assert merged[name].dtype == torch.bfloat16 and wide[name].dtype == torch.float32
        assert (merged[name].double() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert torch.allclose(wide[name].double(), exact, rtol=1e-5, atol=1e-7)
        assert torch.equal(merged[name], wide[name].bfloat16())
    assert json.loads((tmp_path / "w" / "config.json").read_text())["dtype"] == "float32"


def test_tied_weights(tmp_path, tokenizer):
    for seed, name in enumerate("ab"):
        make_model(tokenizer, seed, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    parents = [tmp_path / "a", tmp_path / "b"]
    tensors = tensors_of(parents[1])
    assert "lm_head.weight" not in tensors
    expected = tensors_of(interpolate_checkpoints(parents, [0.5, 0.5], tmp_path / "m", verify=True))
    # The second stores both of the pair
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, parents[1] / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    assert_equal_bits(tensors_of(interpolate_checkpoints(parents, [0.5, 0.5], tmp_path / "n")), expected)
    save_file(
        tensors | {"lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])},
        parents[1] / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"different tensors: .*/b has lm_head.weight, .*/a does not"):
        interpolate_checkpoints(parents, [0.5, 0.5], tmp_path / "o")


def test_a_scale_that_is_missing_is_no_tied_one_though_others_have_its_values(tmp_path, tokenizer):
    for seed, name in enumerate("ab"):
        make_model(tokenizer, seed).save_pretrained(tmp_path / name)
    tensors = tensors_of(tmp_path / "a")
    assert torch.equal(tensors.pop("model.norm.weight"), tensors["model.layers.0.input_layernorm.weight"])  # ones
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    for name in "ab":
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"different tensors: .*/b has model.norm.weight, .*/a does not"):
        interpolate_checkpoints([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "`num_hidden_layers` is 2 in .*a and 3 in .*b"),
        ({"vocab_size": 14}, "`vocab_size` is 13 in .*a and 14 in .*b"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "different architectures: `architectures`",
        ),
        ({"rms_norm_eps": 1e-3}, "`rms_norm_eps`"),
    ],
)
def test_other_architectures_are_refused(pair, tmp_path, change, message):
    edit_config(pair[1], **change)
    with pytest.raises(ValueError, match=message):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_is_no_architecture_may_differ(pair, tmp_path):
    edit_config(pair[1], use_cache=False, transformers_version="4.0", _name_or_path="x", attention_dropout=0.1)
    interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")


def test_other_tensors_are_refused_by_name(pair, tmp_path):
    whole = tensors_of(pair[1])
    name = "model.norm.weight"
    cases = [
        ({name: torch.ones(8)}, r"different shapes of model.norm.weight .*\(16,\) and \(8,\)"),
        ({name: torch.ones(16).bfloat16()}, r"model.norm.weight .*torch.float32 and torch.bfloat16; set `dtype`"),
        ({"extra": torch.ones(1)}, r"b has extra, .*a does not"),
    ]
    for changed, message in cases:
        save_file(whole | changed, pair[1] / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no half-written folder
    for folder, value in zip(pair, (1, 2), strict=True):
        save_file(tensors_of(folder) | {"count": torch.tensor(value)}, folder / "model.safetensors")
    save_file(whole | {"count": torch.tensor(2)}, pair[1] / "model.safetensors")
    with pytest.raises(ValueError, match=r"different values of count .*torch.int64 and cannot be averaged"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")


def test_another_vocabulary_or_codec_is_refused(pair, tmp_path, music):
    text = (pair[1] / "tokenizer.json").read_text()
    (pair[1] / "tokenizer.json").write_text(text.replace('"harp"', '"horn"'))
    with pytest.raises(ValueError, match="different vocabularies, as at 'h"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    shutil.copytree(music[1], tmp_path / "other")
    edit_config(tmp_path / "other" / "codec", floor=1.0)
    with pytest.raises(ValueError, match=r"codecs of .* differ in codec/config.json"):
        interpolate_checkpoints([music[0], tmp_path / "other"], [0.5, 0.5], tmp_path / "m")


def test_another_recorded_base_warns_and_the_base_itself_does_not(pair, tmp_path):
    shutil.copy(pair[0] / "model.safetensors", pair[1])
    (pair[0] / "README.md").write_text("---\nbase_model: b\n---\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    (pair[1] / "README.md").write_text("---\nbase_model: another/base\n---\n")
    with pytest.warns(UserWarning, match=r"different base models \(.*a: b, .*b: another/base\)"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "n")


def test_different_initialisations_warn(pair, tmp_path, music):
    with pytest.warns(
        UserWarning, match=r"has a cosine similarity of -?0.[0-4]\d: do they come from one initialisation"
    ):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolate_checkpoints(music, [0.5, 0.5], tmp_path / "n")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], r"must be finite and sum to 1, got \[0.5, 0.4\], which sum to 0.9"),
        ([1.0], r"one value for each of 2 models \(at least one\), got \[1.0\]"),
        ([float("nan"), 1], "must be finite"),
    ],
)
def test_weights_that_are_refused(pair, tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        interpolate_checkpoints(pair, weights, tmp_path / "m")


def test_folders_that_are_refused(pair, tmp_path):
    out = tmp_path / "m"
    interpolate_checkpoints(pair, [0.5, 0.5], out)
    before = tensors_of(out)
    with pytest.raises(
        FileExistsError, match=r"`output_dir=.*m` is not empty; give another folder, or set `overwrite`"
    ):
        interpolate_checkpoints(pair, [0.2, 0.8], out)
    assert_equal_bits(tensors_of(out), before)
    (out / "old.txt").write_text("x")
    assert_lerp(interpolate_checkpoints(pair, [0.2, 0.8], out, overwrite=True), pair, [0.2, 0.8])
    assert not (out / "old.txt").exists()
    with pytest.raises(ValueError, match=r"contains the input model .*a; give another folder"):
        interpolate_checkpoints(pair, [0.5, 0.5], pair[0], overwrite=True)
    with pytest.raises(ValueError, match=r"`dtype=int8` is unknown; expected one of .*'bfloat16'"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "n", dtype="int8")
    (pair[1] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b has no model.safetensors; give a folder of `save_pretrained`"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "n")
    (pair[1] / "config.json").rename(pair[1] / "adapter_config.json")
    with pytest.raises(ValueError, match=r"`models\[1\]=.*b` is a LoRA adapter; merge it into its base first"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "n")


def test_an_interruption_leaves_the_old_folder_or_none(pair, tmp_path, monkeypatch):
    out = tmp_path / "m"
    interpolate_checkpoints(pair, [0.5, 0.5], out)
    before = tensors_of(out)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "blend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interpolate_checkpoints(pair, [0.2, 0.8], out, overwrite=True)
    assert_equal_bits(tensors_of(out), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "m"]


def test_musicgen(tmp_path, tokenizer):
    parents = [small_musicgen(tmp_path / name, seed, tokenizer) for seed, name in enumerate("ab")]
    merged = interpolate_checkpoints(parents, [0.7, 0.3], tmp_path / "m", verify=True)
    assert_lerp(merged, parents, [0.7, 0.3])
    audio = pipeline("text-to-audio", model=str(merged))("a slow tune", generate_kwargs={"max_new_tokens": 8})
    assert audio["sampling_rate"] == 16000 and audio["audio"].size > 0


def test_a_model_that_does_not_load_as_it_was_saved_is_found(pair):
    tensors = tensors_of(pair[0])
    del tensors["model.norm.weight"]
    save_file(tensors, pair[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"missing_keys.*model.norm.weight"):
        check_that_it_generates(pair[0])


def anonymous_mebibytes() -> float:
    """Memory of this process that is not mapped from files, as those that are read are."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two models of 192 MiB in 24 tensors need less than 128 MiB: three tensors, and what the allocator keeps."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        tensors = {f"w{i}": torch.full((2**21,), seed + i / 8) for i in range(24)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    del tensors
    start, peak, done = anonymous_mebibytes(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mebibytes())

    thread = threading.Thread(target=watch)
    thread.start()
    interpolate_checkpoints([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")
    done.set()
    thread.join()
    assert peak[0] > 0 and peak[0] - start < 128
    assert torch.equal(tensors_of(tmp_path / "m")["w3"], torch.full((2**21,), 0.5 + 3 / 8))


def test_blend_by_hand():
    # 0.25 * 1 + 0.75 * 5 = 4
    one, five = torch.tensor([1.0]), torch.tensor([5.0])
    out = torch.empty(1)
    assert blend([one, five], [0.25, 0.75]).item() == 4.0
    assert blend([one, five], [0.25, 0.75], out=out) is out and out.item() == 4.0
    assert blend([one, five], [0.0, 1.0], out=out).item() == 5.0 and blend([one, five], [0, 1]) is five
    # What is equal in both stays, at any weight
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for tensor in (values, values.bfloat16()):
        assert torch.equal(blend([tensor, tensor], [0.7, 0.3]), tensor)
        # One rounding, not three
        other = tensor.flip(0)
        exact = 0.7 * tensor.double() + 0.3 * other.double()
        assert ((blend([tensor, other], [0.7, 0.3]).double() - exact).abs() <= torch.finfo(tensor.dtype).eps).all()
        assert torch.equal(
            blend([tensor, other], [0.7, 0.3], out=torch.empty_like(tensor)), blend([tensor, other], [0.7, 0.3])
        )
    minus_zero = torch.tensor([-0.0])
    assert blend([minus_zero, five], [1, 0]).signbit().item()
    assert torch.isfinite(blend([one, torch.tensor([torch.inf])], [1.0, 0.0]))
    assert check_weights((1, 0), 2) == [1.0, 0.0]


@pytest.mark.parametrize("merge", [interpolate_checkpoints, merge_with_mergekit])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0, 1]])
def test_the_configuration_is_the_first_models(pair, tmp_path, monkeypatch, merge, weights):
    """mergekit would take that of any, from run to run."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # with which it takes the second's
    for folder, dropout in zip(pair, (0.1, 0.2), strict=True):
        edit_config(folder, attention_dropout=dropout, id2label={"0": folder.name})
    merge(pair, weights, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["attention_dropout"] == 0.1 and config["id2label"] == {"0": "a"}


def test_licences(pair, tmp_path):
    def licence_of(*headers):
        for folder, header in zip(pair, headers, strict=True):
            (folder / "README.md").write_text(f"---\n{header}\ntags: [a, 'base_model:adapter:/home/ann/x']\n---\n")
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m", overwrite=True)
        found = ModelCard.load(tmp_path / "m" / "README.md").data.to_dict()
        assert "/home/ann" not in str(found)
        return {key: value for key, value in found.items() if key.startswith("license")}

    assert (
        licence_of("license: mit", "license: mit") == licence_of("language: en", "license: mit") == {"license": "mit"}
    )
    other = {"license": "other", "license_name": "llama3", "license_link": "https://x.y/z"}
    lines = "\n".join(f"{key}: {value}" for key, value in other.items())
    assert licence_of(lines, lines) == other
    for second in ("license: cc-by-nc-4.0", "license: other\nlicense_name: gemma"):
        with pytest.warns(UserWarning, match="different licences .*, so the card of the merge names none"):
            assert licence_of(lines, second) == {}


def test_further_chat_templates_are_kept(pair, tmp_path, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    own.save_pretrained(pair[0])
    interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == own.chat_template


def test_tokenizers_that_split_otherwise_are_told_of(pair, tmp_path):
    file = pair[1] / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with warnings.catch_warnings():  # another form of the same
        warnings.filterwarnings("error", "the tokenizers")
        content = json.loads(file.read_text()) | {"normalizer": None}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "same")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.warns(UserWarning, match=r"split texts otherwise \(`normalizer` of tokenizer.json\)"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")


def test_a_name_that_is_too_long(pair, tmp_path):
    with pytest.raises(ValueError, match="has 240 bytes; give one of at most 220"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / ("音" * 80))
