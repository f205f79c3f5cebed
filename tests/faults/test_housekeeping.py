"""What a long run leaves behind and keeps in memory is bounded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import WORLDS, make_trainer

from trl_drcd.callbacks import LogFile

SCRIPT = Path(__file__).with_name("memory.py")

SHORT = {"num_iterations": 1, "eval_strategy": "no", "save_steps": 2, "max_completion_length": 4}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_grows_by_its_entries_and_goes_on_after_a_crash(tmp_path, monkeypatch):
    rewritten = []
    monkeypatch.setattr("trl_drcd.callbacks.write_text", lambda path, text: rewritten.append(path.write_text(text)))
    trainer = make_trainer("text", tmp_path, callbacks=[LogFile()], max_steps=3, **SHORT)
    trainer.train()
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 3]
    assert len(rewritten) == 1, "an entry must not cost as much as all that came before"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    trainer = make_trainer("text", tmp_path, callbacks=[LogFile()], max_steps=4, **SHORT)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 4]
    assert lines(tmp_path) == json.loads(json.dumps(trainer.state.log_history))


def test_metrics_that_nobody_logs_do_not_pile_up(tmp_path):
    trainer = make_trainer("text", tmp_path, max_steps=3, logging_strategy="no", **SHORT)
    trainer.train()
    assert not trainer._metrics["train"]


@pytest.mark.slow
def test_memory_of_300_updates_is_flat(tmp_path):
    plot = tmp_path / "memory.png"
    command = [sys.executable, str(SCRIPT), "--steps", "300", "--plot", str(plot)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line.partition(" ")[2]) for line in run.stdout.splitlines() if line.startswith(WORLDS)]
    assert len(results) == 2
    for result in results:
        assert result["checkpoints"] == 2 and result["log_entries"] == 30 + 3 + 1
        warm, last = result["process_MiB"]
        assert abs(last - warm) < 3, "MiB"
    assert plot.stat().st_size < 100_000
