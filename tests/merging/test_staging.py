"""A merged folder appears complete or not at all, whatever is killed, full, or written at the same time."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_merges
import pytest
import torch
from kill_merges import forked, kill, kill_at_each_step, make_models, merge, wrong_with

from trl_drcd import files
from trl_drcd.audio import MusicEmbedder, SpectralCodec
from trl_drcd.merging import interpolate_checkpoints, merge_with_mergekit, mergekit, staging
from trl_drcd.merging.staging import exchange, new_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*has a cosine similarity of")


@pytest.fixture
def models(tmp_path):
    return make_models(tmp_path)


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system that cannot exchange two folders."""
    monkeypatch.setattr(staging, "exchange", kill_merges._refuse)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(output: Path, text: str, overwrite: bool = False, meanwhile=lambda: None) -> None:
    with new_folder(output, [], overwrite) as folder:
        (folder / "file").write_text(text)
        meanwhile()


# ---------------------------------------------------------------- kills


def test_kills_at_some_moments_lose_nothing(models, tmp_path):
    counts = kill(models, tmp_path / "m", kills=6, seed=0)
    assert counts["killed"] + counts["finished"] == 6
    assert counts["lost"] == counts["leftovers"] == 0
    counts = kill_at_each_step(models, tmp_path / "m", every=9)
    assert counts["killed"] >= 5 and counts["lost"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("with_exchange", [True, False])
def test_kills_at_every_step_and_at_random_lose_nothing(models, tmp_path, with_exchange, monkeypatch):
    monkeypatch.setattr(staging, "exchange", staging.exchange)  # put back what `kill` replaces
    counts = kill_at_each_step(models, tmp_path / "m", with_exchange=with_exchange)
    assert counts["killed"] >= 50 and counts["lost"] == 0
    (tmp_path / "steps").unlink(missing_ok=True)
    counts = kill(models, tmp_path / "m", kills=150, seed=1, with_exchange=with_exchange)
    assert counts["killed"] > 30 and counts["old"] > 10 and counts["new"] > 10
    assert counts["lost"] == counts["leftovers"] == 0


def test_a_folder_that_two_renames_moved_is_put_back(tmp_path, no_exchange):
    write(tmp_path / "m", "old")
    (tmp_path / "m").rename(tmp_path / ".m.0123abcd.replaced")  # as a kill between them leaves it
    (tmp_path / ".m.abcdefgh.merging").mkdir()
    with pytest.raises(FileExistsError, match="is not empty; give another folder"):
        write(tmp_path / "m", "new")
    assert (tmp_path / "m" / "file").read_text() == "old" and names(tmp_path) == ["m"]
    write(tmp_path / "m", "new", overwrite=True)
    assert (tmp_path / "m" / "file").read_text() == "new" and names(tmp_path) == ["m"]


def test_leftovers_of_other_names_stay(tmp_path):
    others = [".m.x.abcdefgh.merging", ".m.abc.merging", ".m.abcdefgh.tmp", ".mm.abcdefgh.merging", "m.abcdefgh"]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "m", "x")
    assert names(tmp_path) == sorted([*others, "m"])


# ---------------------------------------------------------------- two at once


def test_two_merges_at_once(models, tmp_path):
    """One writes; the other says that it does not. Both may be the one."""
    codes = []
    for number in range(5):
        output = tmp_path / f"m{number}"
        children = [forked(lambda w=w, output=output: merge(models, w, output)) for w in (0.25, 0.75)]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        assert wrong_with(output) is None
    assert all(set(pair) <= {0, 17} and 0 in pair for pair in codes)
    assert names(tmp_path) == ["a", "b", *(f"m{number}" for number in range(5))]


def test_a_folder_that_another_merge_writes_is_refused_at_once(tmp_path):
    def second():
        with pytest.raises(FileExistsError, match=r"`output_dir=.*m` is being written by another merge; wait for it"):
            write(tmp_path / "m", "second", overwrite=True)
        write(tmp_path / "n", "another name")

    write(tmp_path / "m", "first", meanwhile=second)
    assert (tmp_path / "m" / "file").read_text() == "first" and names(tmp_path) == ["m", "n"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a folder"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_appears_meanwhile_stays(tmp_path, monkeypatch, before, overwrite, can_exchange):
    output = tmp_path / "m"
    if not can_exchange:
        monkeypatch.setattr(staging, "exchange", kill_merges._refuse)
    if before != "nothing":
        output.mkdir()
    if before == "a folder":
        (output / "old").write_text("old")
        overwrite = True

    def appear():
        output.mkdir(exist_ok=True)
        (output / "mine").write_text("precious")

    with pytest.raises(FileExistsError, match=r"appeared or changed while .*the finished merge is in .*/m-") as error:
        write(output, "new", overwrite, appear)
    assert (output / "mine").read_text() == "precious" and (output / "old").exists() == (before == "a folder")
    (kept,) = [path for path in tmp_path.iterdir() if path != output]
    assert str(kept) in str(error.value) and (kept / "file").read_text() == "new"


def test_what_appears_at_the_last_moment_stays(tmp_path, monkeypatch):
    """After the comparison, before the exchange; and as a file."""
    write(tmp_path / "m", "old")
    original = staging._swap

    def late(first, second):
        (tmp_path / "m" / "mine").write_text("precious") if not (first / "mine").exists() else None
        original(first, second)

    monkeypatch.setattr(staging, "_swap", late)
    with pytest.raises(FileExistsError, match="the finished merge is in"):
        write(tmp_path / "m", "new", overwrite=True)
    assert names(tmp_path / "m") == ["file", "mine"] and (tmp_path / "m" / "file").read_text() == "old"
    with pytest.raises(FileExistsError, match="the finished merge is in"):
        write(tmp_path / "n", "new", meanwhile=lambda: (tmp_path / "n").write_text("a file"))
    assert (tmp_path / "n").read_text() == "a file"


# ---------------------------------------------------------------- where it is written


def test_the_folder_is_as_open_as_others(tmp_path):
    """Temporary folders are private, and the result must not be."""
    previous = os.umask(0o027)
    try:
        write(tmp_path / "m", "x")
        (tmp_path / "plain").mkdir()
        files.write_text(tmp_path / "m" / "y", "y")
    finally:
        os.umask(previous)
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "m" / "y").stat().st_mode == (tmp_path / "m" / "file").stat().st_mode


def test_weights_are_as_open_as_other_files(tmp_path, model, tokenizer):
    """safetensors 0.8 writes them for their owner alone: merges, runs, codecs, embedders."""
    previous = os.umask(0o022)
    try:
        for name in ("one", "other"):
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        interpolate_checkpoints([tmp_path / "one", tmp_path / "other"], [0.5, 0.5], tmp_path / "merged")
        SpectralCodec(torch.randn(2, 8, 96), iterations=2).save_pretrained(tmp_path / "codec")
        MusicEmbedder().save_pretrained(tmp_path / "embedder")
    finally:
        os.umask(previous)
    written = [file for name in ("merged", "codec", "embedder") for file in (tmp_path / name).glob("*.safetensors")]
    assert len(written) == 3 and {oct(file.stat().st_mode & 0o777) for file in written} == {"0o644"}
    secret = tmp_path / "codec" / "codec.safetensors"
    secret.chmod(0o640)
    files.open_to_readers(tmp_path)
    assert secret.stat().st_mode & 0o777 == 0o640, "what somebody set is theirs"


def test_a_link_to_a_folder_stays(tmp_path):
    write(tmp_path / "disk" / "m", "old")
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    write(tmp_path / "m", "new", overwrite=True)
    assert (tmp_path / "m").is_symlink() and (tmp_path / "disk" / "m" / "file").read_text() == "new"
    assert names(tmp_path / "disk") == ["m"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "m", "x", meanwhile=lambda: 1 / 0)
    assert names(tmp_path) == []


def test_exchange(tmp_path):
    write(tmp_path / "a", "a")
    write(tmp_path / "b", "b")
    if sys.platform != "linux":
        with pytest.raises(OSError, match="cannot exchange"):
            exchange(tmp_path / "a", tmp_path / "b")
        return
    exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "file").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB; where mounting is not allowed the test is skipped."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(models, small_disk, monkeypatch):
    for room in (True, False):  # refused before anything is computed; found while writing
        if not room:
            monkeypatch.setattr(staging, "check_room", lambda *_: None)
        (small_disk / "filler").write_bytes(bytes(450 << 10))
        with pytest.raises(OSError, match=r"0\.1 MiB are free on its disk; free some, or write to another") as error:
            interpolate_checkpoints(models, [0.5, 0.5], small_disk / "m")
        assert error.value.errno == errno.ENOSPC and f"{small_disk}/m" in str(error.value)
        assert names(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    assert wrong_with(interpolate_checkpoints(models, [0.5, 0.5], small_disk / "m")) is None
    with pytest.raises(ValueError, match="is a mount point, which cannot be replaced by a rename; give a folder in"):
        interpolate_checkpoints(models, [0.5, 0.5], small_disk, overwrite=True)


# ---------------------------------------------------------------- files


def test_a_file_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    files.write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"no room: \d+\.\d MiB are free .*/x'$"):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EROFS, "read")))
    with pytest.raises(
        OSError, match=r"cannot be written \(read-only file system\); give a folder that is writable: .*/x'$"
    ):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_temporary_files_of_dead_processes(tmp_path):
    left = [tmp_path / f".x.{'a1' * 8}.tmp", tmp_path / f".y.{'b2' * 8}.tmp"]
    kept = [tmp_path / ".x.tmp", tmp_path / ".x.0123.tmp", tmp_path / f"x.{'a1' * 8}.tmp"]
    for path in [*left, *kept]:
        path.write_text("x")
    os.utime(left[0], (0, 0))
    os.utime(kept[0], (0, 0))
    files.remove_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == {left[1], *kept}  # the second may still be written
    files.remove_temporaries(tmp_path / "none")


def test_a_link_in_the_way_is_not_followed(tmp_path, monkeypatch):
    """Whoever guesses the temporary name gains nothing: the file must be new."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0" * 16)
    (tmp_path / "target").write_text("mine")
    (tmp_path / f".x.{'0' * 16}.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "x").exists()


# ---------------------------------------------------------------- mergekit as a child


def alive(process: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end the child")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_mergekit_ends_with_its_parent(models, tmp_path, monkeypatch, number):
    program = tmp_path / "mergekit-yaml"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/second\necho $$ > {tmp_path}/first\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(mergekit, "find_mergekit", lambda: str(program))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
    before = names(tmp_path)
    parent = forked(lambda: merge_with_mergekit(models, [0.5, 0.5], tmp_path / "m"))
    assert wait_for(lambda: (tmp_path / "first").exists() and (tmp_path / "first").read_text().strip())
    children = [int((tmp_path / name).read_text()) for name in ("first", "second")]
    os.kill(parent, number)
    status = os.waitpid(parent, 0)[1]
    if number == signal.SIGKILL:
        assert wait_for(lambda: not alive(children[0]))
        os.kill(children[1], signal.SIGKILL)  # mergekit itself starts no further processes
        monkeypatch.undo()
        monkeypatch.setattr(mergekit, "find_mergekit", lambda: "/bin/true")
        with pytest.raises(RuntimeError, match=r"has not written model.safetensors"):
            merge_with_mergekit(models, [0.5, 0.5], tmp_path / "m")
    else:
        assert not any(map(alive, children))
        assert os.waitstatus_to_exitcode(status) == (1 if number == signal.SIGINT else 128 + number)
    assert names(tmp_path) == sorted([*before, "first", "second"])
