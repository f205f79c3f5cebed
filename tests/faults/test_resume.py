"""A resumed run ends with the weights of the uninterrupted one, bit for bit."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler
from worlds import PROMPTS, make_trainer, model, weights

from trl_drcd.mixture import EmbedderMixture
from trl_drcd.reliability.checkpoints import MANIFEST, STAGING, checkpoints, commit, why_incomplete
from trl_drcd.reliability.identity import run_identity
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


def test_the_same_call_starts_and_continues_with_auto(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    assert run("text", tmp_path / "new", resume="auto") == expected
    shutil.copytree(folder / "checkpoint-8", tmp_path / "old" / "checkpoint-8")
    assert run("text", tmp_path / "old", resume="auto") == expected


@pytest.mark.parametrize("lost", ["rollout", "critic", "order"])
def test_the_comparison_would_see(uninterrupted, tmp_path, monkeypatch, lost):
    """A rollout sampled anew; a critic that has forgotten; a second epoch in the order of the first, as in TRL."""
    folder, expected = uninterrupted
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(folder / "checkpoint-8", copy)
    if lost in ("rollout", "critic"):
        for name in ({"rollout": "rollout_0", "critic": "critic"}[lost] + ".safetensors", MANIFEST):
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


# ------------------------------------------------------------------------------------------------ which run it is


def steps_of(folder):
    return sorted(int(c.name.split("-")[1]) for c in checkpoints(folder))


def test_a_complete_run_makes_no_more_updates(uninterrupted, tmp_path):
    """However often it is resumed; the weights are those of its end, and a longer run goes on."""
    folder, expected = uninterrupted
    shutil.copytree(folder / "checkpoint-12", tmp_path / "checkpoint-12")
    for _ in range(2):
        assert run("text", tmp_path, resume=True) == expected
        assert steps_of(tmp_path) == [12]
    assert run("text", tmp_path, resume=True, max_steps=14) != expected
    assert max(steps_of(tmp_path)) == 14


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-3}, "`learning_rate` 0.003 instead of 0.001"),
        ({"seed": 1}, "`seed` 42 instead of 1"),
        ({"train_dataset": Dataset.from_dict({"prompt": PROMPTS[1:6]})}, "`train_dataset` 5 rows"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": PROMPTS[:5], "negative_prompt": ["bad"] * 5})},
            "`train_dataset` 5 rows .* instead of 5 rows",
        ),
        ({"model": model(25, seed=1)}, "`base_weights` .* instead of"),
        ({"gae_lambda": 1.0}, "`gae_lambda` 0.95 instead of 1.0"),
        ({"max_grad_norm_diversity": 1.0}, "`max_grad_norm_diversity` None instead of 1.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(uninterrupted, tmp_path, changed, message):
    folder, _ = uninterrupted
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(
        ValueError, match=rf"checkpoint-6 cannot be resumed from: it belongs to a different run: .*{message}"
    ):
        run("text", tmp_path, resume=True, **changed)


def test_a_row_in_the_middle_and_the_scale_of_an_adapter_are_compared():
    def identity(alpha=8, prompts=("x",) * 2000):
        adapted = get_peft_model(model(25), LoraConfig(r=2, lora_alpha=alpha, target_modules=["v_proj", "q_proj"]))
        return run_identity(SimpleNamespace(), adapted, Dataset.from_dict({"prompt": prompts}))

    first = identity()
    assert identity() == first  # the adapter's own weights were drawn anew
    assert {name for name, value in identity(alpha=16).items() if value != first[name]} == {"adapter"}
    changed = identity(prompts=("x",) * 1000 + ("y",) + ("x",) * 999)
    assert {name for name, value in changed.items() if value != first[name]} == {"train_dataset"}


def test_other_prompts_of_the_teacher_and_other_rewards_are_another_run():
    def identity(taught="y", rewards=(len,)):
        data = Dataset.from_dict({"prompt": ["x"], "negative_prompt": ["n"], "teacher_prompt": [taught]})
        return run_identity(SimpleNamespace(), model(25), data, rewards=rewards)

    def different(**changed):
        return {name for name, value in identity(**changed).items() if value != identity()[name]}

    assert not different()
    assert different(taught="z") == {"teacher_prompts"}
    assert different(rewards=(max,)) == different(rewards=(len, max)) == {"reward_funcs"}


def test_another_embedder_is_another_run():
    """A network by its weights, also inside a mixture or an encoder; a function by its name."""

    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(2, 2)

    def identity(embedder):
        return run_identity(SimpleNamespace(), model(25), Dataset.from_dict({"prompt": ["x"]}), embedder=embedder)

    def mixture(seed, **weights):
        return EmbedderMixture({"a": network(seed), "b": len}, weights)

    same = [(network(0), network(0)), (len, len), (mixture(0), mixture(0))]
    other = [
        (network(0), network(1)),
        (len, max),
        (len, None),
        (mixture(0), mixture(1)),
        (mixture(0), mixture(0, a=2)),
    ]
    other += [(SimpleNamespace(model=network(0)), SimpleNamespace(model=network(1)))]
    for one, two in same:
        assert identity(one) == identity(two)
    for one, two in other:
        first, second = identity(one), identity(two)
        assert {name for name in first if first[name] != second[name]} == {"embedder"}


def test_two_trainings_do_not_share_a_folder(tmp_path):
    trainer = make_trainer("text", tmp_path, max_steps=1)
    code = (
        "import sys, time; from trl_drcd.locks import only_process\n"
        f"with only_process({str(tmp_path)!r}, 'a training'): print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(BlockingIOError, match=rf"a training runs in {tmp_path} already \(process {other.pid} on "):
        trainer.train()
    other.kill()
    other.wait()
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_checkpoint_without_weights_is_none(tmp_path):
    staged = tmp_path / STAGING / "checkpoint-1"
    staged.mkdir(parents=True)
    (staged / "trainer_state.json").write_text("{}")
    with pytest.raises(RuntimeError, match="checkpoint-1 has no weights"):
        commit(staged, tmp_path / "checkpoint-1")
    assert not checkpoints(tmp_path)


class SignalAt(TrainerCallback):
    """Sends this process a signal as an update begins."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_a_training_after_its_update_with_a_checkpoint(uninterrupted, tmp_path, capsys, number, raised):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer("text", tmp_path, callbacks=[SignalAt(number, 6)])
    with pytest.raises(raised) as ended:
        trainer.train()
    assert number == signal.SIGINT or ended.value.code == 143
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    line = f"Ended by {number.name} after 7 updates. The state is in {tmp_path}/checkpoint-7: `resume_from_checkpoint"
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert why_incomplete(tmp_path / "checkpoint-7") is None
    assert run("text", tmp_path, resume=True) == uninterrupted[1]


def test_a_signal_after_a_run_that_saves_nothing(tmp_path, capsys):
    trainer = make_trainer("text", tmp_path, callbacks=[SignalAt(signal.SIGTERM, 1)], save_strategy="no")
    with pytest.raises(SystemExit):
        trainer.train()
    assert "after 2 updates. Nothing is saved, as `save_strategy='no'` says" in capsys.readouterr().err
    assert checkpoints(tmp_path) == []
