"""Tiny models, an evaluation, a study and a running server."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import make_model
from tests.ratings.conftest import environment, evaluation, make_evaluation, study  # noqa: F401


@pytest.fixture(scope="session")
def models(tokenizer, tmp_path_factory) -> list[str]:
    """A base and two trained models, which never end by themselves, so that a call takes as long as it is asked to."""
    folders = []
    for seed, name in enumerate(("base", "quality", "diversity")):
        model = make_model(tokenizer, seed)
        model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


class Server:
    """`trl-drcd app` in a process of its own, on a free port."""

    def __init__(self, *arguments: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.arguments, self.log = arguments, log
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-m", "trl_drcd.cli", "app", *self.arguments, "--port", str(self.port)]
        variables = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=root)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def kill(self) -> None:
        """As a power cut does."""
        self.process.kill()
        self.process.wait(timeout=30)
