"""One of two processes fails: the other one ends too, within a minute, and what is said names the cause."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_drcd.reliability.checkpoints import checkpoints, find_checkpoint, why_incomplete

SCRIPT = Path(__file__).with_name("two_processes.py")
DDP = Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp.yaml"


def launch(fault, output):
    """What was printed; the launcher returns when all processes have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2"]
    result = subprocess.run(
        [*launcher, "--main_process_port", str(port), str(SCRIPT), fault, str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode == 0) == (fault in ("none", "skip")), result.stdout + result.stderr
    return result.stdout + result.stderr


def test_what_one_process_finds_stops_both_with_a_checkpoint(tmp_path):
    printed = launch("embedder", tmp_path)
    message = (
        "After 2 updates: the embedder raised TimeoutError: the embedding service does not answer. The state before"
    )
    for rank in (0, 1):
        assert f"[rank{rank}]: trl_drcd.reliability.batches.BadBatchError: {message}" in printed
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in (tmp_path / "checkpoint-2").iterdir()}


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_update(tmp_path):
    printed = launch("signal", tmp_path)
    line = f"Ended by SIGTERM after 3 updates. The state is in {tmp_path}/checkpoint-3"
    assert printed.count(line) == 1
    assert "exitcode  : 143" in printed
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.slow
def test_both_processes_leave_the_same_updates_out(tmp_path):
    """Once before any forward, once between forward and backward, which must not confuse DDP."""
    printed = launch("skip", tmp_path)
    assert re.findall(r"Update (\d) is skipped .*: (?:the embedder raised|the KL to the teacher)", printed) == [
        "3",
        "4",
    ]
    saved = {int(c.name.split("-")[1]): (c / "model.safetensors").read_bytes() for c in checkpoints(tmp_path)}
    assert sorted(saved) == [2, 3, 4, 5]
    assert saved[2] == saved[3] == saved[4] != saved[5]


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
    launch("none", tmp_path / "whole")
    printed = launch(fault, tmp_path / "run")
    seconds = time.time() - (tmp_path / "run" / "checkpoint-2").stat().st_mtime  # it was written just before the fault
    assert seconds < 60
    print(f"{fault}: all processes had ended {seconds:.1f} s after the checkpoint before")
    for message in messages:
        assert message in printed
    saved = checkpoints(tmp_path / "run")
    assert all(why_incomplete(checkpoint) is None for checkpoint in saved)
    assert saved[0].name == f"checkpoint-{last}"
    launch("none", tmp_path / "run")
    model = "model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
