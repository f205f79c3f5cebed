"""Folders from outside: links that leave them, files side by side, broken files, names with markup."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from huggingface_hub import ModelCard
from merge_worlds import assert_equal_bits, assert_lerp, random_adapter, tensors_of, trained_music_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_drcd.files import own_file
from trl_drcd.merging import hold_checkpoints, interpolate_adapters, interpolate_checkpoints, merge_with_mergekit
from trl_drcd.merging.safetensors_files import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*has a cosine similarity of", "ignore:.*is_gradient_checkpointing")
SECRET = "hf_secretsecretsecret"


@pytest.fixture
def pair(tmp_path, tokenizer):
    for seed, name in enumerate("ab"):
        make_model(tokenizer, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def token(tmp_path):
    """What a link out of a folder may lead to."""
    file = tmp_path / "token"
    file.write_text(SECRET)
    return file


def holds_secret(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


# ---------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "tokenizer.model", "generation_config.json", "preprocessor_config.json", "README.md"),
        *("codec/config.json", "codec/codec.safetensors", "codec/README.md", "model.safetensors", "config.json"),
    ],
)
def test_a_link_out_of_a_model_is_refused(pair, tmp_path, token, name):
    (pair[0] / name).parent.mkdir(exist_ok=True)
    (pair[0] / name).unlink(missing_ok=True)
    (pair[0] / name).symlink_to(os.path.relpath(token, (pair[0] / name).parent))
    with pytest.raises(ValueError, match=rf"a/{name} is a link out of the folder, to .*token; put the file itself"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_codec_that_is_a_link_is_refused(pair, tmp_path, token):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text(SECRET)
    (pair[0] / "codec").symlink_to(tmp_path / "home")
    with pytest.raises(ValueError, match=r"codec/config.json is a link out of the folder"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")


def test_known_files_alone_are_copied_and_circles_do_no_harm(tmp_path, token):
    model = trained_music_model(tmp_path / "music", 0)
    (model / "codec" / "again").symlink_to(model / "codec")
    (model / "codec" / "token").symlink_to(token)
    (model / "token").write_text(SECRET)
    (model / "itself").symlink_to("itself")
    (model / "chat_template.jinja").symlink_to("chat_template.jinja")
    merged = interpolate_checkpoints([model], [1.0], tmp_path / "m")
    assert sorted(path.name for path in (merged / "codec").iterdir()) == [
        *("README.md", "codec.safetensors", "config.json"),
    ]
    assert not holds_secret(merged) and not (merged / "itself").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"])
def test_a_link_out_of_an_adapter_is_refused(pair, tmp_path, token, name):
    adapter = random_adapter(tmp_path / "adapter", pair[0], 0)
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(token)
    with pytest.raises(ValueError, match=rf"`adapters\[0\]`: .*{name} is a link out of the folder"):
        interpolate_adapters([adapter, "base"], [0.5, 0.5], tmp_path / "m")
    with pytest.raises(ValueError, match=r"generation_config.json is a link out of the folder"):
        good = random_adapter(tmp_path / "good", pair[0], 0)
        (pair[0] / "generation_config.json").unlink()
        (pair[0] / "generation_config.json").symlink_to(token)
        interpolate_adapters([good], [1.0], tmp_path / "m", base_model=pair[0])


def test_the_cache_of_the_hub_is_made_of_links(pair, tmp_path):
    """Its snapshots link to the blobs of the same repository, and nowhere else."""
    repository = tmp_path / "hub" / "models--x--a"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in pair[0].iterdir():
        shutil.copyfile(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert_lerp(interpolate_checkpoints([snapshot, pair[1]], [0.5, 0.5], tmp_path / "m"), pair, [0.5, 0.5])
    other = tmp_path / "hub" / "models--x--b" / "blobs" / "blob"
    other.parent.mkdir(parents=True)
    other.write_text(SECRET)
    (snapshot / "chat_template.jinja").symlink_to(other)
    with pytest.raises(ValueError, match=r"chat_template.jinja is a link out of the folder"):
        interpolate_checkpoints([snapshot, pair[1]], [0.5, 0.5], tmp_path / "n")


def test_own_files(tmp_path, token):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "file").write_text("x")
    (tmp_path / "m" / "inside").symlink_to("file")
    (tmp_path / "m" / "outside").symlink_to(token)
    (tmp_path / "m" / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to("m")
    assert own_file(tmp_path / "link", "inside") == tmp_path / "link" / "inside"  # the folder itself may be a link
    assert own_file(tmp_path / "m", "none") is own_file(tmp_path / "m", "circle") is None
    for name in ("outside", "../token"):
        with pytest.raises(ValueError, match="is a link out of the folder"):
            own_file(tmp_path / "m", name)


# ---------------------------------------------------------------- what is checked is what is loaded


def with_index(folder: Path) -> dict[str, torch.Tensor]:
    """Puts shards and an index with other weights beside the single file; returns the weights of the single file."""
    single = tensors_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict({name: tensor + 1 for name, tensor in single.items()})
    (folder / "model.safetensors").rename(folder / "kept")
    model.save_pretrained(folder, max_shard_size="4KB")
    (folder / "kept").rename(folder / "model.safetensors")
    return single


@pytest.mark.parametrize("merge", [interpolate_checkpoints, pytest.param(merge_with_mergekit, marks=pytest.mark.slow)])
def test_a_single_file_beside_an_index(pair, tmp_path, merge):
    """transformers loads the single file, mergekit the shards: here all take the single file, and check it."""
    single = with_index(pair[0])
    assert_equal_bits(dict(AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()), single)
    assert_equal_bits(tensors_of(merge([pair[0], pair[1]], [1.0, 0.0], tmp_path / "m", verify=True)), single)
    os.truncate(pair[0] / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"a/model.safetensors is truncated"):
        merge(pair, [0.5, 0.5], tmp_path / "n")


def test_an_index_and_its_shards_agree(pair, tmp_path):
    with_index(pair[0])
    (pair[0] / "model.safetensors").unlink()
    index = json.loads((pair[0] / "model.safetensors.index.json").read_text())
    shard = pair[0] / index["weight_map"]["lm_head.weight"]
    save_file(load_file(shard) | {"model.norm.weight": torch.ones(16)}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"a has a tensor in two of its files"):
        interpolate_checkpoints(pair, [0.5, 0.5], tmp_path / "m")
    save_file({"x": torch.ones(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"index.json names lm_head.weight, which none of its files has"):
        Checkpoint(pair[0])


@pytest.mark.slow
def test_mergekit_takes_folders_of_any_name(pair, tmp_path):
    """`@` is a revision to mergekit, and `+` an adapter."""
    odd = [pair[0].rename(tmp_path / "a@b+c"), pair[1].rename(tmp_path / "b: [x]")]
    assert_lerp(merge_with_mergekit(odd, [0.5, 0.5], tmp_path / "m@1"), odd, [0.5, 0.5], tolerance=2.4e-7)


# ---------------------------------------------------------------- names with markup


def test_markup_in_cards(pair, tmp_path):
    names = ["<script>alert(1)", "a | b `x` [y](http:z)"]
    odd = [folder.rename(tmp_path / name) for folder, name in zip(pair, names, strict=True)]
    head = "---\ntags: [ok, 1, {a: b}]\npipeline_tag: [x]\nlicense: {a: b}\nbase_model: base\n---\n<script>x</script>"
    (odd[0] / "README.md").write_text(head)
    merged = interpolate_checkpoints(odd, [0.5, 0.5], tmp_path / "# <b>m")
    card = ModelCard.load(merged / "README.md")
    assert card.data.base_model == names and card.data.tags == ["merge", "trl-drcd", "ok"]
    assert card.data.pipeline_tag is None and card.data.license is None
    text = card.text.replace(card.text[card.text.index("```yaml") : card.text.rindex("```")], "")
    assert "<script>" not in text and "<b>" not in text and "](http:z)" not in text
    assert text.count("\n# ") + text.startswith("# ") == 1
    (row,) = [line for line in text.splitlines() if "0.5" in line and "http" in line]
    assert row.replace("\\|", "").count("|") == 3


# ---------------------------------------------------------------- mutated folders

GOOD = (ValueError, FileNotFoundError)


def mutate(file: Path, chance: random.Random) -> str:
    """Changes a file in one of many ways, and says how."""
    content = file.read_bytes()
    kinds = ["cut", "empty", "noise", "flip", "insert", "text", "gone", "folder"]
    if file.suffix == ".json":
        kinds += ["value"] * 12 + ["key"] * 3
    if file.suffix == ".safetensors":
        kinds += ["header"] * 8
    kind = chance.choice(kinds)
    if kind == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "noise":
        file.write_bytes(chance.randbytes(chance.randrange(1, 200)))
    elif kind == "flip":
        place = chance.randrange(min(len(content), 4000))
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
    elif kind == "insert":
        place = chance.randrange(len(content))
        file.write_bytes(content[:place] + chance.randbytes(chance.randrange(1, 20)) + content[place:])
    elif kind == "text":
        file.write_text(chance.choice(["null", "[]", "3", '"x"', "{}", '{"a": {}}', "[" * 5000, "\ufeff{}", "NaN"]))
    elif kind == "gone":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "header":
        size = int.from_bytes(content[:8], "little")
        place = chance.randrange(8 + size)
        file.write_bytes(content[:place] + chance.randbytes(1) + content[place + 1 :])
    else:
        return f"{kind} {mutate_json(file, chance, kind)}"
    return kind


ODD = [
    *(None, True, -1, 0, 1, 3, 10**9, -(10**30), 1.5, float("nan"), "", "x", "../x", "\x00", "(", [], [1], ["x"], {}),
    *({"a": 1}, {"(": 2}, [[0, 1]], [None], "auto"),
]


def mutate_json(file: Path, chance: random.Random, kind: str) -> str:
    """Gives one entry, at any depth, another value; or adds, renames or removes one."""
    content = json.loads(file.read_text())
    place, path = content, []
    while True:
        if not place:
            return "nothing"
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        path.append(key)
        if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.6:
            place = place[key]
            continue
        break
    if kind == "key" and isinstance(place, dict):
        value = place.pop(key)
        if chance.random() < 0.5:
            place[str(key) + "_x"] = value
    else:
        place[key] = chance.choice(ODD)
    file.write_text(json.dumps(content))
    return f"{path} -> {place.get(key, 'gone') if isinstance(place, dict) else place[key]!r}"


def make_world(folder: Path) -> None:
    """A checkpoint in one file, one in shards, a music model with a codec, two adapters; small files of every kind."""
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("single", "sharded")):
        model = make_model(tokenizer, seed, attention_bias=True)
        model.save_pretrained(folder / name, max_shard_size="50GB" if name == "single" else "4KB")
        tokenizer.save_pretrained(folder / name)
        (folder / name / "README.md").write_text("---\nbase_model: base\ntags: [x]\nlicense: mit\n---\n# x\n")
        (folder / name / "codec").mkdir()
        (folder / name / "codec" / "config.json").write_text('{"codec_type": "spectral", "hop_length": 640}')
        save_file({"codebooks": torch.ones(1, 2, 2)}, folder / name / "codec" / "codec.safetensors")
        (folder / name / "preprocessor_config.json").write_text('{"feature_size": 1}')
        settings = ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {"lora_bias": True})[seed]
        random_adapter(folder / f"adapter{seed}", folder / "single", seed, **settings)
        shutil.copyfile(folder / "single" / "generation_config.json", folder / f"adapter{seed}/generation_config.json")
        tokenizer.save_pretrained(folder / f"adapter{seed}")


def use(folder: Path, which: str, out: Path) -> None:
    """What a user does with such a folder."""
    if which.startswith("adapter"):
        other = folder / ("adapter1" if which == "adapter0" else "adapter0")
        interpolate_adapters([folder / which, other], [0.5, 0.5], out)
        interpolate_adapters([folder / which], [1.0], out.with_name("into"), base_model=folder / "single")
    else:
        interpolate_checkpoints([folder / "single", folder / "sharded"], [0.5, 0.5], out, verify=True)
        interpolate_checkpoints([folder / which], [1.0], out.with_name("alone"), verify=True)
        model = make_model(make_tokenizer(), attention_bias=True)
        hold_checkpoints(model, [folder / which])


def fuzz(world: Path, tmp_path: Path, cases: int, seed: int) -> dict[str, int]:
    """Mutates one file of one folder at a time; every failure must be one line that names the folder or a file."""
    chance, counts = random.Random(seed), {"refused": 0, "accepted": 0, "escaped": 0}
    for number in range(cases):
        which = chance.choice(["single", "sharded", "adapter0", "adapter1"])
        work = tmp_path / f"case{number}"
        shutil.copytree(world, work)
        file = chance.choice(sorted(path for path in (work / which).rglob("*") if path.is_file()))
        how = mutate(file, chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(work, which, work / "out")
            counts["accepted"] += 1
        except GOOD as error:
            one_line = "\n" not in str(error) and len(str(error)) < 1500
            named = any(word in str(error) for word in (which, "different", "/out/", "/alone/"))
            if type(error) not in GOOD or not one_line or not named:
                counts["escaped"] += 1
                print(f"{number}: {file.relative_to(work)} {how}: {type(error).__name__}: {error}")
            counts["refused"] += 1
        except BaseException as error:
            counts["escaped"] += 1
            print(f"{number}: {file.relative_to(work)} {how}: {type(error).__name__}: {error}")
        if left := [path.name for path in work.iterdir() if path.name.startswith(".")]:
            counts["escaped"] += 1
            print(f"{number}: left {left}")
        shutil.rmtree(work)
    return counts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def test_mutated_folders(world, tmp_path):
    counts = fuzz(world, tmp_path, cases=12, seed=0)
    assert counts["escaped"] == 0 and counts["refused"] >= 3


@pytest.mark.slow
def test_many_mutated_folders(world, tmp_path):
    counts = fuzz(world, tmp_path, cases=400, seed=1)
    assert counts["escaped"] == 0 and counts["refused"] > 150, counts
