"""A Hub on loopback that the real client talks to, and a trained-looking folder to push."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.conftest import make_model
from tests.hub.server import TOKEN, Hub
from trl_drcd.hub import client


@pytest.fixture
def hub(monkeypatch):
    """The server, as the Hub of this process; time between tries is short."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.utils._runtime, "is_xet_available", lambda: False)
        monkeypatch.setattr(huggingface_hub._commit_api, "is_xet_available", lambda: False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
        close_session()
        yield server
        close_session()


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A trained model as `trl-drcd train` leaves it, with what must not go out beside it."""
    path = tmp_path / "quality"
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    card = "---\nbase_model: user/base\nlicense: apache-2.0\ntags: [trl]\n---\n\n# quality\n"
    use = '\n```python\nname = "quality"  # of this folder, or on the Hub\n```\n'
    (path / "README.md").write_text(card + use)
    (path / "samples").mkdir()
    rows = [{"prompt": "slow tune", "completion": "harp | drum"}]
    (path / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.save({}, path / "optimizer.pt")
    torch.save({}, path / "training_args.bin")
    (path / "checkpoint-1").mkdir()
    torch.save({}, path / "checkpoint-1" / "rng_state.pth")
    (path / "log.jsonl").write_text("{}\n")
    (path / ".env").write_text("HF_TOKEN=secret\n")
    return path
