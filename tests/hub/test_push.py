"""Pushes over HTTP, by the real client, to a Hub on loopback: what goes there, and faults on the way."""

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.conftest import make_model
from tests.hub.server import TOKEN
from trl_drcd.cli import main
from trl_drcd.hub import client, files_to_push, push_to_hub
from trl_drcd.hub.metrics import plot_of
from trl_drcd.hub.privacy import check_text
from trl_drcd.hub.selection import read_samples
from trl_drcd.hub.upload import check_repo_id

PUSHED = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "samples/samples.jsonl",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_files_on_the_list_alone(folder):
    assert set(files_to_push(folder)) == PUSHED


def test_a_single_shard_goes_with_its_index(folder):
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = PUSHED - {"model.safetensors"} | {shard, "model.safetensors.index.json"}
    assert set(files_to_push(folder)) == expected


def test_dry_run_shows_every_file_and_sends_nothing(hub, folder, capsys):
    main(["push", str(folder), "user/quality", "--dry_run"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in PUSHED)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in shown
    assert "to the private model user/quality" in shown
    assert "Left out: .env, checkpoint-1/, log.jsonl, optimizer.pt, training_args.bin" in shown
    assert hub.requests == []


def test_push_is_private_and_whole(hub, folder, capsys):
    main(["push", str(folder), "user/quality"])
    repo = hub.repos["user/quality"]
    assert repo.private
    assert set(repo.files) == PUSHED | {".gitattributes"}
    assert repo.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    out = capsys.readouterr()
    assert f"{hub.url}/user/quality" in out.out
    assert TOKEN not in out.out + out.err
    assert TOKEN not in repr(repo.files)


def test_public_is_explicit(hub, folder):
    push_to_hub(folder, "user/quality", public=True)
    assert not hub.repos["user/quality"].private
    with pytest.raises(PermissionError, match="user/quality is public; give `--public`"):
        push_to_hub(folder, "user/quality", overwrite=True)


def test_public_needs_a_license(folder):
    (folder / "README.md").write_text("# quality\n")
    with pytest.raises(ValueError, match="no licence"):
        push_to_hub(folder, "user/quality", public=True, dry_run=True)
    push_to_hub(folder, "user/quality", public=True, dry_run=True, license="mit")


def test_existing_files_are_replaced_only_when_asked(hub, folder):
    push_to_hub(folder, "user/quality")
    repo = hub.repos["user/quality"]
    repo.files |= {"notes.txt": b"mine", "model-00001-of-00002.safetensors": b"old"}
    before = dict(repo.files)
    with pytest.raises(SystemExit, match=r"user/quality is already on the Hub, with 9 files; give `--yes`"):
        main(["push", str(folder), "user/quality"])
    assert repo.files == before
    main(["push", str(folder), "user/quality", "--yes"])
    assert set(repo.files) == PUSHED | {".gitattributes", "notes.txt"}  # shards of an earlier push would be loaded


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("part", ["whoami", "repos/create", "preupload", "objects/batch", "/lfs/", "commit/main"])
@pytest.mark.parametrize("status", [500, 429])
def test_a_fault_that_passes_is_tried_again(hub, folder, part, status, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(part, status, retry_after="0")
    push_to_hub(folder, "user/quality")
    assert set(hub.repos["user/quality"].files) == PUSHED | {".gitattributes"}
    assert hub.faults == []


@pytest.mark.parametrize("part", ["whoami", "commit/main"])
def test_a_fault_that_stays_is_one_line(hub, folder, part):
    hub.fail(part, 429, times=9, retry_after="0")
    with pytest.raises(SystemExit) as error:
        main(["push", str(folder), "user/quality"])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("trl-drcd push: error: push of user/quality: too many requests;")
    assert hub.seen("POST" if part == "commit/main" else "GET", part) == 1 + len(client.WAITS)


def test_401(hub, folder, monkeypatch):
    secret = "hf_" + "y" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(SystemExit) as error:
        main(["push", str(folder), "user/quality"])
    assert str(error.value) == (
        "trl-drcd push: error: push of user/quality: the Hub refuses the token; log in with `hf auth login`, or set "
        "HF_TOKEN to a token with write access (HTTP 401)"
    )
    assert hub.repos == {}


def test_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="no token for the Hub"):
        push_to_hub(folder, "user/quality")


def test_timeout(hub, folder, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    hub.fail("commit/main", "hang")
    push_to_hub(folder, "user/quality")
    hub.fail("whoami", "hang", times=9)
    with pytest.raises(ConnectionError, match=r"the Hub cannot be reached \(ReadTimeout\)"):
        push_to_hub(folder, "user/quality", overwrite=True)
    hub.faults.clear()


def test_half_an_upload_is_resumed(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    save_file({"x": torch.zeros(4)}, folder / "codec.safetensors")
    (folder / "codec").mkdir()
    (folder / "codec.safetensors").rename(folder / "codec" / "codec.safetensors")
    (folder / "codec" / "config.json").write_text("{}")
    # the first attempt: one large file arrives, the commit never does
    hub.fail("commit/main", 503, times=9, retry_after="0")
    with pytest.raises(ConnectionError, match="finished uploads are not repeated"):
        push_to_hub(folder, "user/quality")
    assert set(hub.repos["user/quality"].files) == {".gitattributes"}
    hub.faults.clear()
    assert hub.seen("PUT", "/lfs/") == 2
    push_to_hub(folder, "user/quality")  # without `overwrite`: nothing of anybody is there
    assert hub.seen("PUT", "/lfs/") == 2
    assert "model.safetensors" in hub.repos["user/quality"].files


def test_an_upload_that_breaks_in_the_middle_is_sent_again(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("/lfs/", "half", method="PUT")
    push_to_hub(folder, "user/quality")
    assert hub.repos["user/quality"].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- what must not go out


def test_links_out_of_the_folder(folder, tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "samples" / "samples.jsonl").unlink()
    (folder / "samples" / "samples.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ValueError, match="is a link out of the folder"):
        files_to_push(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b.wav", "run.sh", ".env"])
def test_samples_name_sounds_in_their_folder(folder, name):
    (folder / "samples" / "samples.jsonl").write_text(json.dumps({"prompt": "a", "file": name}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a sample"):
        read_samples(folder)


def test_pickled_weights(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        files_to_push(folder)


def test_torn_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="torn"):
        files_to_push(folder)


def test_a_token_in_a_text(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text() + f"\nexport HF_TOKEN={TOKEN}\n")
    with pytest.raises(ValueError, match="contains an access token") as error:
        push_to_hub(folder, "user/quality", dry_run=True)
    assert TOKEN not in str(error.value)


def test_a_path_in_a_text(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nfrom /home/me/run\n")
    with pytest.raises(ValueError, match=r"README.md, line .* contains a local path, /home/me"):
        push_to_hub(folder, "user/quality", dry_run=True)


def test_places_in_configurations_are_taken_out(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(folder)}))
    push_to_hub(folder, "user/quality")
    assert json.loads(hub.repos["user/quality"].files["config.json"]) == config
    assert "_name_or_path" in json.loads((folder / "config.json").read_text())  # the folder stays as it is


def adapter(folder, base):
    folder.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nbase_model: quality\nlicense: mit\n---\n\n# a\n")
    return folder


def test_the_base_of_an_adapter_must_be_on_the_hub(hub, folder, tmp_path):
    path = adapter(tmp_path / "lora", str(folder))
    with pytest.raises(ValueError, match="is not a name on the Hub; give `base_model`"):
        push_to_hub(path, "user/lora")
    with pytest.raises(FileNotFoundError, match=r"user/quality is not on the Hub.*push the base first"):
        push_to_hub(path, "user/lora", base_model=["user/quality"])
    assert hub.repos == {}
    push_to_hub(folder, "user/quality")
    push_to_hub(path, "user/lora", base_model=["user/quality"])
    files = hub.repos["user/lora"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/quality"
    header = ModelCard(files["README.md"].decode()).data.to_dict()
    assert header["base_model"] == "user/quality" and header["base_model_relation"] == "adapter"
    assert str(folder).encode() not in b"".join(files.values())


@pytest.mark.parametrize("name", ["quality", "a/b/c", "/tmp/x", "user/", "user/a b"])
def test_names(name):
    with pytest.raises(ValueError, match="give owner/name"):
        check_repo_id(name)


def test_a_model_replaces_an_adapter(hub, folder, tmp_path, tokenizer):
    """What the adapter's push has left would be loaded with it."""
    model = get_peft_model(make_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    push_to_hub(folder, "user/base")
    push_to_hub(tmp_path / "adapter", "user/m", base_model=["user/base"])
    repo = hub.repos["user/m"]
    repo.files |= {"notes.txt": b"mine", "codec/config.json": b"{}"}
    assert {"adapter_config.json", "chat_template.jinja"} <= set(repo.files)
    assert "base_model:adapter" not in repo.files["README.md"].decode()
    push_to_hub(folder, "user/m", overwrite=True)
    assert set(repo.files) == PUSHED | {".gitattributes", "notes.txt"}


@pytest.mark.parametrize(
    "text",
    [
        "see /home/ann/x", "cwd:/home/ann/run", "file:///home/ann/x", "file:///x", "//home/ann/x", "C:/Users/ann/x",
        "/fsx/ann/run", "/gpfs/x", "/lustre/x", "/Volumes/x", "/private/x", "///home/ann/x", "sqlite:////home/ann/x",
        "docker -v/home/ann:/x", "gcc -I/home/ann/x", "C:/models/mine/x", r"D:\models", "github_pat_" + "1a" * 15,
    ],
)  # fmt: skip
def test_paths_and_tokens_do_not_go_out(text):
    with pytest.raises(ValueError, match=r"README.md, line 2 contains (a local path|an access token)"):
        check_text("README.md", f"# model\nmade in {text}")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/data/x",
        "http://home/ann",
        "git@host:data/x",
        "a/home/ann",
        "and/or",
        "1:/2",
        "Q:/A",
        "N:/A",
        "M:/4 x",
        "<a href='/app/index.html'>",
    ],
)
def test_addresses_are_no_paths(text):
    check_text("README.md", f"see {text}")


def test_a_plot_that_is_a_link_out_of_the_folder_is_refused(hub, folder, tmp_path):
    (tmp_path / "key").write_text("PRIVATE KEY")
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "front.png").symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=r"front\.png"):
        plot_of(tmp_path / "front", [])


@pytest.mark.parametrize("text", ["[", "", "{}", "models: [a]", "models: [a]\nweights: [x]"])
def test_a_record_that_is_broken_is_named(hub, folder, text):
    (folder / "merge.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"merge\.yaml must hold `models` and as many `weights`"):
        push_to_hub(folder, "user/quality")
