"""Checkpoints are complete or ignored, and what is saved stays, whatever happens to the writing of the next."""

import json
import logging
import os
import resource
import shutil

import pytest
from worlds import make_trainer

from trl_drcd.reliability.checkpoints import (
    MANIFEST,
    STAGING,
    checkpoints,
    commit,
    earlier_run,
    find_checkpoint,
    rotate,
    why_incomplete,
)


def write_checkpoint(folder, step, content=b"0123456789" * 100):
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "deep").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "deep/optimizer.bin"):
        (staged / name).write_bytes(content)
    commit(staged, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (lambda c: (c / "deep" / "optimizer.bin").unlink(), "deep/optimizer.bin is missing"),
    "cut": (lambda c: os.truncate(c / "model.safetensors", 10), "model.safetensors has 10 bytes instead of 1000"),
    "empty": (lambda c: os.truncate(c / "model.safetensors", 0), "model.safetensors has 0 bytes instead of 1000"),
    "bit": (lambda c: flip_a_bit(c / "model.safetensors"), "model.safetensors has changed since"),
    "unfinished": (lambda c: (c / MANIFEST).unlink(), "it has no complete.json"),
    "half a list": (lambda c: os.truncate(c / MANIFEST, 30), "it cannot be read (JSONDecodeError"),
    "no list": (lambda c: (c / MANIFEST).write_text("[]"), "it cannot be read (TypeError"),
    "nothing": (lambda c: [shutil.rmtree(c), c.mkdir()], "it has no complete.json"),
}


def test_a_fresh_start_names_the_newest_complete_checkpoint(tmp_path, caplog):
    (tmp_path / "checkpoint-3").mkdir()  # incomplete
    assert earlier_run(tmp_path) is None and earlier_run(tmp_path / "none") is None
    trainer = make_trainer("text_lora", tmp_path, max_steps=2, save_steps=1, eval_strategy="no")
    trainer.train()
    assert "starts afresh" not in caplog.text
    problem = earlier_run(tmp_path)
    assert problem.startswith(f"`output_dir={tmp_path}` holds checkpoint-2 of an earlier run")
    trainer.train()
    assert f"This training starts afresh: {problem}" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_complete_checkpoint_is_taken(tmp_path, caplog, damage):
    for step in (8, 10, 9):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").write_text("no folder")
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / "checkpoint-10")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(True, tmp_path) == find_checkpoint("true", tmp_path) == str(tmp_path / "checkpoint-9")
    line = caplog.records[0].message
    assert f"Resuming from {tmp_path / 'checkpoint-9'}, the newest complete checkpoint" in line
    assert f"(skipped checkpoint-10: {message}" in line

    for step in (8, 9):
        hurt(tmp_path / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint that is complete \(checkpoint-10: .*checkpoint-8: "):
        find_checkpoint(True, tmp_path)
    if damage in ("missing", "cut", "bit", "half a list"):
        with pytest.raises(FileNotFoundError, match="is not a complete checkpoint: "):
            find_checkpoint(str(tmp_path / "checkpoint-10"), tmp_path)


def test_a_checkpoint_is_replaced_in_one_piece(tmp_path):
    write_checkpoint(tmp_path, 3, b"old" * 400)
    write_checkpoint(tmp_path, 3, b"new" * 400)
    assert why_incomplete(tmp_path / "checkpoint-3") is None
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes() == b"new" * 400
    assert not any((tmp_path / STAGING).iterdir())


def test_older_checkpoints_go_when_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []

    def watch(staged, final, identity):
        seen.append([c.name for c in checkpoints(tmp_path)])
        commit(staged, final, identity)

    monkeypatch.setattr("trl_drcd.reliability.writer.commit", watch)
    make_trainer("text_lora", tmp_path, max_steps=3, save_steps=1, eval_strategy="no", save_total_limit=1).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "left"),
    [(None, {2, 4, 6, 8, 9, 20}), (0, {2, 4, 6, 8, 9, 20}), (1, {2, 6}), (3, {2, 4, 6}), (4, {2, 4, 6, 20})],
)
def test_what_rotation_deletes(tmp_path, limit, left):
    """6 was just written and 2 is the best; 20 was there before, 8 and 9 are torn."""
    for step in (2, 4, 6, 8, 9, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-9" / MANIFEST).unlink()
    rotate(tmp_path, limit, {tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"})
    assert {int(c.name.split("-")[1]) for c in checkpoints(tmp_path)} == left


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path):
    trainer = make_trainer(
        "text_lora", tmp_path, max_steps=3, save_steps=1, eval_steps=1, metric_for_best_model="eval_kl",
        greater_is_better=False, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert why_incomplete(tmp_path / best) is None
    for checkpoint in checkpoints(tmp_path):
        assert STAGING not in json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_file_cannot_grow(tmp_path, limit):
    """The limit of a process instead of that of a disk, which needs no rights; small files or large ones fail."""
    trainer = make_trainer("text", tmp_path, max_steps=4, eval_strategy="no")
    make = trainer._save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        make(*args)

    trainer._save_checkpoint = save
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written") as raised:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2 and older ones are untouched" in str(raised.value)
    assert "MiB were free" in str(raised.value) and raised.value.__cause__ is not None
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")


def test_auto_is_the_newest_checkpoint_or_none(tmp_path, caplog):
    assert find_checkpoint("auto", tmp_path) is None and not caplog.records
    incomplete = tmp_path / "checkpoint-1"
    incomplete.mkdir()
    assert find_checkpoint("auto", tmp_path) is None
    assert "starts afresh" in caplog.text and "checkpoint-1" in caplog.text  # what is left out is named
    write_checkpoint(tmp_path, 3)
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-3")
