"""One of two processes fails: the other one ends too, within a minute, and what is said names the cause."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_drcd._checkpoints import checkpoints, find_checkpoint, why_incomplete

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(fault, output):
    """What was printed, and the seconds that it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    start = time.monotonic()
    result = subprocess.run([*launcher, str(SCRIPT), fault, str(output)], capture_output=True, text=True, timeout=300)
    assert (result.returncode == 0) == (fault == "none"), result.stdout + result.stderr
    return result.stdout + result.stderr, time.monotonic() - start


def test_what_one_process_finds_stops_both_with_a_checkpoint(tmp_path):
    printed, _ = launch("embedder", tmp_path)
    message = (
        "After 2 updates: the embedder raised TimeoutError: the embedding service does not answer. The state before"
    )
    for rank in (0, 1):
        assert f"[rank{rank}]: trl_drcd._poison.BadBatchError: {message}" in printed
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in (tmp_path / "checkpoint-2").iterdir()}


# What is printed, and the last checkpoint. A hanging process is waited for as long as `ddp_timeout` says (15 s).
FAULTS = {
    "dies": (["exitcode  : -9", "rank      : 1", "Root Cause (first observed failure)"], 2),
    "hangs": (
        [
            "After 2 updates, process 0 has lost another process, which ended or did not answer for 15 s",
            "process 0: it waits for the others' rewards; process 1: it embeds.",
        ],
        2,
    ),
    "disk": (
        ["[rank1]: OSError: checkpoint-3 could not be written to", "checkpoint-2 and older ones are untouched"],
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_all_end_within_a_minute_and_resume(tmp_path, fault):
    messages, last = FAULTS[fault]
    _, start_up = launch("none", tmp_path / "whole")
    printed, seconds = launch(fault, tmp_path / "run")
    assert seconds < start_up + 15 + 60
    for message in messages:
        assert message in printed
    saved = checkpoints(tmp_path / "run")
    assert all(why_incomplete(checkpoint) is None for checkpoint in saved)
    assert saved[0].name == f"checkpoint-{last}"
    launch("none", tmp_path / "run")
    model = "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
