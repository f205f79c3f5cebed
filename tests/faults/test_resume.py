"""A resumed run ends with the weights of the uninterrupted one, bit for bit."""

import logging
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl.trainer.utils import RepeatSampler
from worlds import PROMPTS, make_trainer, weights

from trl_drcd.reliability.checkpoints import MANIFEST, STAGING, checkpoints, why_incomplete
from trl_drcd.reliability.sampler import EpochSampler

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def run(world, folder, resume=None, **changed):
    trainer = make_trainer(world, folder, **changed)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    return weights(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run("text", folder, save_total_limit=None)


@pytest.mark.parametrize("step", [6, 8])
def test_every_checkpoint_leads_to_the_same_weights(uninterrupted, tmp_path, step):
    """6: a rollout is used up, and with it the epoch. 8: in the midst of a rollout, with another one to come."""
    folder, expected = uninterrupted
    assert (folder / f"checkpoint-{step}" / "rollout_0.safetensors").exists() == (step == 8)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert run("text", tmp_path, resume=True) == expected


@pytest.mark.parametrize("lost", ["rollout", "order"])
def test_the_comparison_would_see(uninterrupted, tmp_path, monkeypatch, lost):
    """A rollout that is sampled anew; a second epoch in the order of the first, as it would be in TRL."""
    folder, expected = uninterrupted
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(folder / "checkpoint-8", copy)
    if lost == "rollout":
        for name in ("rollout_0.safetensors", MANIFEST):
            (copy / name).unlink()
    else:
        monkeypatch.setattr(EpochSampler, "__iter__", lambda self: iter(self.sampler))
    assert run("text", tmp_path, resume=str(copy)) != expected


def test_a_stream_of_prompts_goes_on_where_it_was(tmp_path):
    stream = Dataset.from_dict({"prompt": PROMPTS * 4}).to_iterable_dataset()
    expected = run("text_lora", tmp_path / "run", train_dataset=stream, save_total_limit=None)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    assert run("text_lora", tmp_path / "again", resume=True, train_dataset=stream) == expected


def test_the_order_of_prompts_is_that_of_trl_in_every_epoch():
    def sampler():
        return RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)

    theirs, trainer = sampler(), SimpleNamespace(state=SimpleNamespace(epoch=None))
    epochs = [list(theirs) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in (None, 0.5, 1.0, 1.9, 2.0):
        trainer.state.epoch = epoch
        ours = EpochSampler(sampler(), trainer)
        assert list(ours) == epochs[int(epoch or 0)] and len(ours) == len(epochs[0])


def test_training_goes_on_from_the_checkpoint_before_the_torn_one(uninterrupted, tmp_path, caplog):
    folder, expected = uninterrupted
    for step in (8, 10):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    os.truncate(tmp_path / "checkpoint-10" / "optimizer.pt", 100)
    (tmp_path / STAGING / "checkpoint-12").mkdir(parents=True)  # as a kill leaves it
    with caplog.at_level(logging.WARNING):
        assert run("text", tmp_path, resume=True) == expected
    line = (
        "checkpoint-8, the newest complete checkpoint (skipped checkpoint-10: optimizer.pt has 100 bytes instead of "
    )
    assert any(line in record.message for record in caplog.records)
    assert not (tmp_path / STAGING).exists()


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at `folder`; where mounting is not allowed the test is skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_fills(uninterrupted, tmp_path):
    """A file system of 500 KiB; a checkpoint has 140. With more room the run goes on where it was."""
    disk = tmp_path / "disk"
    with small_disk(disk, 500 << 10):
        with pytest.raises(
            OSError, match=rf"checkpoint-\d+ could not be written to {disk}, where 0\.\d MiB were free"
        ):
            make_trainer("text", disk, save_total_limit=None).train()
        saved = checkpoints(disk)
        assert saved and all(why_incomplete(checkpoint) is None for checkpoint in saved)
        assert not (disk / STAGING).exists()
        assert int(saved[0].name.split("-")[1]) < 12
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        assert run("text", disk, resume=True) == uninterrupted[1]


def kills(*arguments):
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_killed_and_resumed():
    assert "2 of 2 equal bit for bit" in kills("--kills", "2", "--worlds", "music_lora")


@pytest.mark.slow
def test_killed_at_twenty_points_and_resumed():
    assert kills("--kills", "20").count("20 of 20 equal bit for bit") == 4
