"""An evaluation in several processes that is ended from outside: nothing goes on without it, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import make_model

from trl_drcd.evaluation.results import read_results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tokenizer, tmp_path):
    model = make_model(tokenizer, max_position_embeddings=4096)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "slow"}\n{"prompt": "harp"}\n')
    config = {
        "model": str(tmp_path / "m"), "dataset": str(tmp_path / "p.jsonl"), "output_dir": str(tmp_path / "out"),
        "num_prompts": 2, "samples_per_prompt": 2, "num_processes": 2, "max_new_tokens": 3,
        "strategies": [{"name": "base"}, {"name": "hot", "temperature": [1.0, 1.1]}],
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    return [sys.executable, "-m", "trl_drcd.cli", "evaluate", "--config", str(tmp_path / "c.yaml")]


def workers(parent):
    """The processes that measure rows; not the one that watches over shared memory."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_evaluation(command, tmp_path, number, request):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # So long that no row could end by itself
    words = [*command, "--max_new_tokens", "4000"]
    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    request.addfinalizer(process.kill)
    deadline, seen = time.monotonic() + 240, []
    while len(seen) < 2 or sum(one.cpu_times().user for one in seen) < 16:  # loaded, and sampling
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
        seen = workers(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it
    else:
        process.send_signal(number)
    error, code = process.communicate(timeout=120)[1], process.returncode
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert f"ended by {number.name}: what is measured stays in results.jsonl" in error
    _, alive = psutil.wait_procs(seen, timeout=20)
    for one in alive:
        one.kill()
    assert not alive and code == (-9 if number == signal.SIGKILL else 128 + number)
    # What is there is whole, and a second call goes on
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    assert [row.name for row in read_results(tmp_path / "out" / "results.jsonl")] == [
        "base", "hot (T 1)", "hot (T 1.1)",
    ]  # fmt: skip
    assert not list((tmp_path / "out").rglob(".*.tmp"))
