"""
Kill merges with SIGKILL at random moments, and look at what is left.

    python tests/merging/kill_merges.py --kills 200
    python tests/merging/kill_merges.py --kills 200 --without_exchange
    python tests/merging/kill_merges.py --steps

Each merge runs in a process of its own, forked from this one, and replaces the result of the one before, with other
weights. After each kill the folder must be complete: the merge that its `merge.yaml` records, every file of it, every
tensor. After the next merge nothing may be left beside it. Without the exchange of two folders (as on macOS and some
network mounts) the folder may lie beside its name until the next merge begins, and is looked at then.
"""

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from trl_drcd.merging import interpolate_checkpoints, staging

FILES = {"README.md", "config.json", "generation_config.json", "merge.yaml", "model.safetensors"}
CONFIG = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}'


def make_models(folder: Path, tensors: int = 12) -> list[Path]:
    """Two models of a few tensors; their merges say what their weights were."""
    torch.set_num_threads(1)
    for value, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(CONFIG)
        state = {f"w{number}": torch.full((64, 64), value + number / 8) for number in range(tensors)}
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    return [folder / "a", folder / "b"]


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does this work, in a process group of its own, its output thrown away."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, and would die locked
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except FileExistsError:
        code = 17
    finally:
        os._exit(code)


def wrong_with(output: Path) -> str | None:
    """What is wrong with a merged folder; `None` for a complete one."""
    if not output.is_dir():
        return "nothing is there"
    if (found := {path.name for path in output.iterdir()}) != FILES:
        return f"it holds {sorted(found)}"
    weight = yaml.safe_load((output / "merge.yaml").read_text())["weights"][1]
    for name, tensor in load_file(output / "model.safetensors").items():
        if not torch.allclose(tensor, torch.full((64, 64), weight + int(name[1:]) / 8), atol=1e-6):
            return f"{name} is not of weight {weight}"
    return None


def merge(models: list[Path], weight: float, output: Path) -> None:
    interpolate_checkpoints(models, [1 - weight, weight], output, overwrite=True)


def recover(output: Path) -> None:
    """Begin a merge, and give up."""
    try:
        with staging.new_folder(output, [], overwrite=True):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def kill(models: list[Path], output: Path, kills: int, seed: int, with_exchange: bool = True) -> Counter[str]:
    """
    Kill so many merges.

    Returns:
        `Counter`: `killed` and `finished` merges, those after which the folder was the `old` or the `new` one, and
        `lost` ones, each of which is printed.
    """
    chance, counts = random.Random(seed), Counter[str]()
    if not with_exchange:
        staging.exchange = _refuse
    merge(models, 0.5, output)
    start = time.perf_counter()
    merge(models, 0.5, output)
    duration = time.perf_counter() - start
    for number in range(kills):
        before = yaml.safe_load((output / "merge.yaml").read_text())["weights"][1]
        child = forked(partial(merge, models, chance.random(), output))
        time.sleep(chance.uniform(0, 1.3 * duration))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not with_exchange:
            recover(output)
        counts["killed" if killed else "finished"] += 1
        if problem := wrong_with(output):
            counts["lost"] += 1
            print(f"kill {number}: {problem}", file=sys.stderr)
            merge(models, 0.5, output)
        else:
            after = yaml.safe_load((output / "merge.yaml").read_text())["weights"][1]
            counts["old" if after == before else "new"] += 1
        if number % 10 == 9:
            merge(models, 0.5, output)
            left = {path.name for path in output.parent.iterdir()} - {output.name, *(m.name for m in models)}
            counts["leftovers"] += len(left)
    return counts


def kill_at_each_step(models: list[Path], output: Path, every: int = 1, with_exchange: bool = True) -> Counter[str]:
    """
    Kill a merge at its n-th operation on files, for each n; see [`kill`].

    Args:
        every (`int`, *optional*, defaults to 1): Leave out all but every so many steps.
    """
    counts = Counter[str]()
    if not with_exchange:
        staging.exchange = _refuse
    merge(models, 0.5, output)
    record = output.with_name("steps")
    step = 0
    while True:
        record.unlink(missing_ok=True)
        child = forked(lambda step=step: _end_at(step, record) or merge(models, 0.25 + 0.5 * (step % 2), output))
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not with_exchange:
            recover(output)
        counts["killed" if killed else "finished"] += 1
        if problem := wrong_with(output):
            counts["lost"] += 1
            print(f"step {step}, {record.read_text()}: {problem}", file=sys.stderr)
        if not killed:
            return counts
        step += every


def _end_at(step: int, record: Path) -> None:
    """Let this process kill itself at the n-th operation on files from now on, and write down which one that is."""
    seen = [0]

    def watch(event: str, args: tuple[object, ...]) -> None:
        if not (event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "ctypes.", "tempfile."))):
            return
        seen[0] += 1
        if seen[0] == step + 1:
            seen[0] += 1000
            record.write_text(f"{event} {args}")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _refuse(first: Path, second: Path) -> None:
    raise OSError(errno.EINVAL, "no exchange")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without_exchange", action="store_true")
    parser.add_argument("--steps", action="store_true", help="kill at each operation on files instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        output, exchange = Path(folder, "merged"), not args.without_exchange
        if args.steps:
            counts = kill_at_each_step(models, output, with_exchange=exchange)
        else:
            counts = kill(models, output, args.kills, args.seed, exchange)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    raise SystemExit(bool(counts["lost"] or counts["leftovers"]))


if __name__ == "__main__":
    main()
