"""Collections, and the samples of an evaluation as a data set: over HTTP to the Hub on loopback."""

import json
from io import BytesIO

import pytest
import soundfile
import torch
from datasets import Audio, load_dataset
from huggingface_hub import DatasetCard

from tests.hub.server import TOKEN
from trl_drcd.cli import main
from trl_drcd.evaluation.listening import keep_completions
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.hub import add_to_collection, client, push_to_hub
from trl_drcd.merging import interpolate_checkpoints

SLUG = "user/diverse-music-" + "0" * 24
INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}


def evaluation(folder, completions):
    """The folder of an evaluation of two strategies, which kept two samples of each."""
    folder.mkdir()
    (folder / "front.png").write_bytes(b"\x89PNG")
    (folder / "report.html").write_text("not for the Hub")
    rows = []
    for name, weight in (("base", None), ("LERP (lambda 0.5)", 0.5)):
        slug = f"{name.split()[0]}_1"
        keep_completions(folder / "samples" / slug, Samples(["a tune", "harp"], [[0]] * 2, 1, 1.0), completions, 2, 1)
        rows.append(
            Result(
                strategy=name, point=name, name=name, prompts=64, samples_per_prompt=8,
                metrics={"quality": INTERVAL, "kl": INTERVAL},
                samples=slug, interpolation_weight=weight, kind="text",
            )
        )  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return folder


def downloaded(repo, folder):
    for name, content in repo.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


# ---------------------------------------------------------------- collections


def test_a_collection_holds_model_merge_data_set_and_paper(hub, folder, tmp_path):
    main(["push", str(folder), "user/quality", "--collection", "Diverse music"])
    interpolate_checkpoints([folder, folder], [0.75, 0.25], tmp_path / "merged")
    parents = ["user/quality", "user/diversity"]
    push_to_hub(tmp_path / "merged", "user/merged", base_model=parents, collection="Diverse music")
    push_to_hub(evaluation(tmp_path / "front", ["x", "y"]), "user/samples", collection="Diverse music")
    collection = hub.collections[SLUG]
    assert collection["private"] and collection["title"] == "Diverse music"
    assert [(item["type"], item["id"]) for item in collection["items"]] == [
        ("paper", "2410.06084"), ("model", "user/quality"), ("model", "user/merged"), ("dataset", "user/samples")
    ]  # fmt: skip
    assert [item["note"] for item in collection["items"]] == [None, None, {"text": "lambda = 0.25"}, None]
    address = add_to_collection("user/quality", "Diverse music")  # once more changes nothing
    assert address == f"{hub.url}/collections/{SLUG}" and len(hub.collections[SLUG]["items"]) == 4


def test_a_public_push_makes_a_public_collection(hub, folder):
    push_to_hub(folder, "user/quality", public=True, collection="Diverse music")
    assert not hub.collections[SLUG]["private"]


@pytest.mark.parametrize("title", ["", " ", "x" * 60])
def test_titles_are_looked_at_before_anything_is_sent(hub, folder, title):
    with pytest.raises(ValueError, match="must be a title of 1 to 59 characters"):
        push_to_hub(folder, "user/quality", collection=title)
    assert hub.requests == []


@pytest.mark.parametrize("status", [500, 429])
def test_faults_of_collections(hub, folder, status, monkeypatch):
    hub.fail("api/collections", status, retry_after="0")
    push_to_hub(folder, "user/quality", collection="Diverse music")
    assert len(hub.collections[SLUG]["items"]) == 2
    hub.fail("/items", status, times=9, retry_after="0")
    with pytest.raises(ConnectionError, match="collection Diverse music of user/quality: ") as error:
        add_to_collection("user/quality", "Diverse music")
    assert TOKEN not in str(error.value) and hub.seen("POST", "/items") == 2 + 1 + len(client.WAITS)


def test_a_refused_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    with pytest.raises(PermissionError, match="the Hub refuses the token"):
        add_to_collection("user/quality", "Diverse music")


# ---------------------------------------------------------------- samples


def test_texts_become_a_data_set(hub, tmp_path, capsys):
    folder = evaluation(tmp_path / "front", ["harp | drum", "flute"])
    main(["push", str(folder), "user/samples", "--dry_run"])
    assert "to the private dataset user/samples" in (shown := capsys.readouterr().out) and hub.requests == []
    assert "Left out: report.html, samples/" in shown
    main(["push", str(folder), "user/samples", "--license", "cc-by-4.0", "--base_model", "user/base"])
    repo = hub.repos["datasets/user/samples"]
    assert repo.private
    assert set(repo.files) == {".gitattributes", "README.md", "front.png", "results.jsonl", "samples.jsonl"}
    data = load_dataset(downloaded(repo, tmp_path / "got"), split="train")
    assert data["completion"][:] == ["harp | drum", "flute"] * 2 and data["prompt"][:] == ["a tune", "harp"] * 2
    assert data["strategy"][:] == ["base"] * 2 + ["LERP (lambda 0.5)"] * 2
    assert data["interpolation_weight"][:] == [None, None, 0.5, 0.5]
    card = DatasetCard(repo.files["README.md"].decode())
    header = card.data.to_dict()
    assert header["license"] == "cc-by-4.0" and header["source_models"] == ["user/base"]
    assert 'load_dataset("user/samples", split="train")' in card.text and "| LERP (lambda 0.5) | 0.5 |" in card.text
    assert "![Quality" in card.text and str(tmp_path) not in repr(repo.files)


def test_sounds_become_a_data_set(hub, tmp_path):
    sounds = [(torch.linspace(-1, 1, 800), 8000), (torch.zeros(800), 8000)]
    push_to_hub(evaluation(tmp_path / "front", sounds), "user/samples")
    repo = hub.repos["datasets/user/samples"]
    assert set(repo.files) == {".gitattributes", "README.md", "front.png", "results.jsonl", "samples.parquet"}
    data = load_dataset(downloaded(repo, tmp_path / "got"), split="train")
    assert isinstance(data.features["audio"], Audio)
    data = data.cast_column("audio", Audio(decode=False))  # decoding takes torchcodec
    assert {"strategy", "interpolation_weight", "guidance_scale"} <= set(data.column_names)
    assert data["prompt"][:] == ["a tune", "harp"] * 2
    assert data["interpolation_weight"][:] == [None, None, 0.5, 0.5]
    for row in data:
        waveform, rate = soundfile.read(BytesIO(row["audio"]["bytes"]))
        assert rate == 8000 and (abs(waveform).max() > 0.9) == (row["prompt"] == "a tune")
        assert row["audio"]["path"].endswith(".wav") and "/" not in row["audio"]["path"]
    card = repo.files["README.md"].decode()
    assert 'samples.cast_column("audio", datasets.Audio(decode=False))' in card
    assert str(tmp_path) not in repr(repo.files)


def test_what_of_samples_is_refused(tmp_path):
    folder = evaluation(tmp_path / "front", ["x", "y"])
    with pytest.raises(ValueError, match="has no licence; give `license`, such as cc-by"):
        push_to_hub(folder, "user/samples", public=True, dry_run=True)
    with pytest.raises(ValueError, match="is an evaluation, whose samples are pushed; leave out `strategy`"):
        push_to_hub(folder, "user/samples", strategy="base", dry_run=True)
    (folder / "samples/base_1/00_0.txt").write_text(f"my token is {TOKEN}")
    with pytest.raises(ValueError, match="an access token"):
        push_to_hub(folder, "user/samples", dry_run=True)
    for index in folder.glob("samples/*/samples.jsonl"):
        index.unlink()
    with pytest.raises(FileNotFoundError, match="no kept samples; evaluate again with `listen` above 0"):
        push_to_hub(folder, "user/samples", dry_run=True)
