"""A job of several processes: signals reach all of them, none outlives the one that started it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import WORDS

from trl_drcd.reliability.checkpoints import why_incomplete

# A job whose program starts another, as `accelerate launch` does; each writes its pid and waits
PROGRAM = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path({folder!r})
child = subprocess.Popen([sys.executable, "-c", {child!r}])
(folder / "program").write_text(str(os.getpid()))
{then}
"""
CHILD = """
import os, pathlib, signal, time
from trl_drcd.launch.processes import end_on_signals
folder = pathlib.Path({folder!r})
with end_on_signals("child"):
    (folder / "child").write_text(str(os.getpid()))
    try:
        time.sleep(60)
    finally:
        time.sleep(0.2)  # as a checkpoint takes time to be written
        (folder / "ended").touch()
"""
JOB = (
    "import sys; from trl_drcd.launch.processes import run_job; sys.exit(run_job([sys.executable, '-c', {program!r}]))"
)


@pytest.fixture
def start(tmp_path):
    """Starts the job, and waits until both of its processes are there."""
    started = []

    def start(then: str = "child.wait()") -> subprocess.Popen:
        child = CHILD.format(folder=str(tmp_path))
        program = PROGRAM.format(folder=str(tmp_path), child=child, then=then)
        job = subprocess.Popen([sys.executable, "-c", JOB.format(program=program)], stderr=subprocess.PIPE, text=True)
        started.append(job)
        wait_for(lambda: all((tmp_path / name).exists() for name in ("program", "child")))
        return job

    yield start
    for job in started:
        job.kill()
        job.wait()


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_gone(file: Path) -> bool:
    """Whether the process whose pid is in the file has ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process_and_the_status_says_so(tmp_path, start, number):
    job = start()
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + number
    assert errors == "child: ended by SIGTERM\n"  # one line, no traceback
    assert (tmp_path / "ended").exists()  # it was waited for
    assert is_gone(tmp_path / "program") and is_gone(tmp_path / "child")


def test_no_process_outlives_a_job_that_is_killed(tmp_path, start):
    job = start()
    job.kill()
    wait_for(lambda: is_gone(tmp_path / "program") and is_gone(tmp_path / "child"))
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(("then", "status"), [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_what_a_program_leaves_behind_is_ended_and_its_status_kept(tmp_path, start, then, status):
    then = f"while not (folder / 'child').exists(): time.sleep(0.05)\n{then}"
    job = start(then)
    job.communicate(timeout=60)
    assert job.returncode == status
    assert (tmp_path / "ended").exists() and is_gone(tmp_path / "child")


def test_a_job_is_stopped_and_goes_on(tmp_path, start):
    job = start()
    job.send_signal(signal.SIGTSTP)
    states = {name: Path(f"/proc/{(tmp_path / name).read_text()}/stat") for name in ("program", "child")}
    wait_for(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in states.values()))
    os.kill(job.pid, signal.SIGCONT)
    wait_for(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "S" for stat in states.values()))
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 143


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_with_one_line(tmp_path, tokenizer, model, number):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = [{"prompt": f"slow {word}"} for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    settings = {
        "model_name_or_path": tmp_path / "model", "dataset": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 100_000, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "max_completion_length": 4, "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "steps", "save_steps": 100_000, "disable_tqdm": True,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "trl_drcd.cli", "train", "text", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        log = tmp_path / "out" / "log.jsonl"
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 2, 200)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    said = re.fullmatch(r"Ended by SIGTERM after (\d+) updates. The state is in (.*): .*", errors.splitlines()[-1])
    assert said is not None and "Traceback" not in errors
    assert why_incomplete(Path(said[2])) is None and said[2] == str(tmp_path / "out" / f"checkpoint-{said[1]}")
    running = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(str(tmp_path).encode() in line for line in running)
