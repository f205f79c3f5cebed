"""How many threads torch gets on a CPU."""

import os
import subprocess
import sys
from multiprocessing import get_context

import psutil
import pytest
import torch
from conftest import make_model

from trl_drcd.cli import evaluate
from trl_drcd.compat.threads import decoding_threads, own_cores, use_own_cores
from trl_drcd.evaluation.measuring import _start
from trl_drcd.launch.training import make_trainer
from trl_drcd.policies import CausalLMPolicy


@pytest.fixture(autouse=True)
def threads():
    """Whatever a test sets, the next one has what it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "before", "local_world_size", "processes", "after"),
    [
        (8, 16, None, None, 8),  # hyper-threads are not counted
        (8, 16, None, 3, 2),  # processes of an evaluation share them
        (8, 16, "4", None, 2),  # and those of a launch
        (8, 1, None, None, 1),  # OMP_NUM_THREADS=1, or what a launcher sets
        (8, 3, "2", None, 3),
        (2, 2, "8", None, 1),  # never none
    ],
)
def test_no_more_threads_than_cores(monkeypatch, cores, before, local_world_size, processes, after):
    monkeypatch.setattr("trl_drcd.compat.threads.own_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    torch.set_num_threads(before)
    use_own_cores(processes)
    assert torch.get_num_threads() == after


@pytest.mark.parametrize(("weights", "inside"), [(100, 1), (30_000_000, 3)])
def test_small_models_sample_on_one_thread(weights, inside):
    torch.set_num_threads(3)
    model = torch.nn.Linear(1, weights, bias=False, device="meta")
    with pytest.raises(KeyError), decoding_threads(model):
        assert torch.get_num_threads() == inside
        raise KeyError
    assert torch.get_num_threads() == 3


def test_a_rollout_leaves_the_threads_as_they_were(tokenizer):
    torch.set_num_threads(2)
    seen = []
    model = make_model(tokenizer)
    model.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    CausalLMPolicy(tokenizer).rollout(model, [[1, 5]] * 2, max_new_tokens=3)
    assert set(seen) == {1} and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("physical", "affinity", "quota", "cores"),
    [
        (8, 16, None, 8),  # hyper-threads are not counted
        (None, 2, "max 100000", 2),  # unknown, as on some virtual machines
        (64, 64, "250000 100000", 2),
        (64, 4, "800000 100000", 4),
        (64, 64, "50000 100000", 1),  # half a core
    ],
)
def test_cores_are_those_that_this_process_may_use(monkeypatch, tmp_path, physical, affinity, quota, cores):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota + "\n")
    assert own_cores(file) == cores


def test_a_process_of_an_evaluation_takes_its_share(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    pool = get_context("spawn").Pool(1, _start, (own_cores(),))
    with pool:
        assert pool.apply(torch.get_num_threads) == 1
    assert os.environ["OMP_NUM_THREADS"] == "64"


ENVIRONMENT = """
import os, sys
from unittest import mock
from trl_drcd import cli
def push(words):
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
with mock.patch.dict(cli.COMMANDS, {"push": push}):
    cli.main(["push"])
"""
SCRIPT = "import os, trl_drcd.scripts.train_text; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
@pytest.mark.parametrize("program", [ENVIRONMENT, SCRIPT])
def test_waiting_threads_sleep_early_unless_told_otherwise(given, spins, program):
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", program], env=others | given, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() in ([spins], [spins, "False"])  # torch reads it when it is imported


def test_training_and_evaluation_use_their_cores(monkeypatch, tmp_path):
    class Reached(Exception):
        pass

    def use(processes=None):
        raise Reached

    monkeypatch.setattr("trl_drcd.launch.training.use_own_cores", use)
    with pytest.raises(Reached):
        make_trainer(None, None, None, None, None)
    monkeypatch.setattr("trl_drcd.compat.threads.use_own_cores", use)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    words = ["--model", "m", "--dataset", str(tmp_path / "prompts.jsonl"), "--config", str(tmp_path / "config.yaml")]
    (tmp_path / "config.yaml").write_text("strategies: [{name: base}]\n")
    with pytest.raises(Reached):
        evaluate(words)
