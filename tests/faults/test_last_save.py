"""What a training writes beside its checkpoints: folders that cannot be written to, full disks, other runs' files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import small_disk
from worlds import make_trainer

from trl_drcd.files import DiskError, check_writable
from trl_drcd.reliability.checkpoints import checkpoints

SHORT = {"num_iterations": 1, "eval_strategy": "no", "save_steps": 1, "max_steps": 1, "max_completion_length": 4}
WORK = Path(__file__).parent


def test_a_read_only_folder_is_found_before_anything_is_loaded(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 1 << 20):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in (disk, disk / "new" / "run"):
            with pytest.raises(
                DiskError, match=rf"`output_dir={folder}` cannot be written to: {disk} is read-only; give"
            ):
                make_trainer("text", folder, **SHORT)


def test_a_folder_in_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        check_writable("out", tmp_path / "file" / "run")


@pytest.mark.parametrize("kib", [4, 8, 20, 28])
def test_the_disk_fills_in_the_last_save(tmp_path, kib):
    """Whatever file it is that has no room; with more of it the run is completed without another update."""
    trainer = make_trainer("text", tmp_path / "run", **SHORT)
    trainer.train()
    disk = tmp_path / "disk"
    with small_disk(disk, kib << 10):
        with pytest.raises(
            DiskError, match=r"disk could not be written \(no room: 0\.\d MiB are free.* The state is in"
        ):
            trainer.save_model(str(disk))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        trainer.save_model(str(disk))
        assert (disk / "README.md").is_file() and not (disk / "training_args.bin").exists()
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_quota_is_a_full_disk(tmp_path, monkeypatch):
    trainer = make_trainer("text", tmp_path, **SHORT | {"save_strategy": "no"})
    trainer.train()

    def refused(*args, **kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("trl_drcd.trainer.write_card", refused)
    with pytest.raises(DiskError, match=r"could not be written .*Nothing is saved, as `save_strategy='no'` says"):
        trainer.save_model()


@pytest.mark.parametrize(("first", "second", "file"), [
    ("text", "text_lora", "model.safetensors of another run, and this one saves an adapter"),
    ("text_lora", "text", "adapter_config.json of another run, and this one saves a whole model"),
])  # fmt: skip
def test_a_model_of_the_other_kind_is_not_saved_beside_one(tmp_path, first, second, file):
    trainer = make_trainer(first, tmp_path, **SHORT)
    trainer.save_model()
    make_trainer(first, tmp_path, **SHORT)
    with pytest.raises(ValueError, match=rf"`output_dir={tmp_path}` has the {file}.*give another folder"):
        make_trainer(second, tmp_path, **SHORT)


def test_a_foreign_checkpoint_takes_one_line(tmp_path):
    """As other errors of the input do, although it is found when training starts."""
    code = (
        f"import sys; sys.path.insert(0, {str(WORK)!r})\n"
        "from worlds import make_trainer\n"
        "from trl_drcd.launch.training import NO_FAULT_OF_CODE\n"
        "from trl_drcd.validation.messages import one_line_errors\n"
        f"short = {SHORT!r}\n"
        "make_trainer('text', sys.argv[1], **short).train()\n"
        "with one_line_errors('program', NO_FAULT_OF_CODE):\n"
        "    make_trainer('text', sys.argv[1], seed=1, **short).train(True)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "program: error: " in run.stderr and "`seed` 42 instead of 1; use the settings" in run.stderr
