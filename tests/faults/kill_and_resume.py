"""
Kills training with SIGKILL at random points, resumes it, and compares the final weights bit for bit.

Of the kills a quarter each falls anywhere in the run, in the writing of a checkpoint, in a rollout, and between two
rollouts. Runs are tiny (see worlds.py) and on the CPU; each is a process of its own, forked from one that has done the
imports.

    python tests/faults/kill_and_resume.py --kills 20
    python tests/faults/kill_and_resume.py --kills 3 --worlds text music_lora --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor may a process have threads when it forks
sys.path.insert(0, str(Path(__file__).parent))

from worlds import WORLDS, make_trainer, weights

from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.reliability.checkpoints import STAGING, checkpoints, why_incomplete

# What a run tells of itself: a letter as the method begins, a letter as it ends; and "." as training begins
SPOKEN = {
    "save_model": ("s", ""),  # the first that is written of a checkpoint
    "commit": ("", "S"),
    "_generate_and_score_completions": ("r", "R"),
}
# Kinds of moments: from one letter to another; "E" is the run's end
SPANS = {"anywhere": ".E", "checkpoint": "sS", "rollout": "rR", "between rollouts": "Rr"}
ATTEMPTS = 10  # after which a delay of seconds has become one of milliseconds


@dataclass
class Moment:
    """When to kill: `delay` seconds after the `number`-th (from 0) `letter` of the run."""

    kind: str
    letter: str
    number: int
    delay: float


def announce(trainer: CFGDistillDiversityTrainer, pipe: int) -> None:
    """Lets the trainer write its letters into the pipe."""
    for name, (first, last) in SPOKEN.items():
        owner = trainer._checkpoints if name == "commit" else trainer
        method = getattr(owner, name)

        def spoken(*args, method=method, first=first, last=last, **kwargs):
            os.write(pipe, first.encode())
            result = method(*args, **kwargs)
            os.write(pipe, last.encode())
            return result

        setattr(owner, name, spoken)
    os.write(pipe, b".")


def train(world: str, output: Path, resume: bool, pipe: int) -> None:
    """A run from start or checkpoint to end; weights of the end in `output`."""
    trainer = make_trainer(world, output)
    announce(trainer, pipe)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output))


@contextmanager
def process(world: str, output: Path, resume: bool = False) -> Iterator[tuple[int, int]]:
    """The run in a process of its own: its id, and the end of the pipe to read from; what it prints is in `log`."""
    output.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            log = os.open(output / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(world, output, resume, writing)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    try:
        yield pid, reading
    finally:
        os.close(reading)


def ended_by(pid: int) -> int:
    """0 for a run that came to its end, else minus the signal that ended it, or its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def letters(pipe: int) -> Iterator[str]:
    while letter := os.read(pipe, 1):
        yield letter.decode()


def whole_run(world: str, output: Path, resume: bool = False) -> list[tuple[float, str]]:
    """Runs to the end; the letters, each with its time in seconds."""
    with process(world, output, resume) as (pid, pipe):
        times = [(time.perf_counter(), letter) for letter in letters(pipe)]
        if status := ended_by(pid):
            raise SystemExit(f"{world} ended with {status}:\n{(output / 'log').read_text()[-3000:]}")
        return [*times, (time.perf_counter(), "E")]


def draw(kind: str, times: list[tuple[float, str]], random_state: random.Random) -> Moment:
    """A moment of this kind, uniform in the time of the uninterrupted run that is of this kind."""
    first, last = SPANS[kind]
    starts = [i for i, (_, letter) in enumerate(times) if letter == first]
    spans = []
    for number, i in enumerate(starts):
        end = next((at for at, letter in times[i + 1 :] if letter == last), None)
        if end is not None:
            spans.append((number, end - times[i][0]))
    number, seconds = random_state.choice(spans)
    return Moment(kind, first, number, seconds * random_state.random())


def kill(world: str, output: Path, moment: Moment) -> bool:
    """Runs until the moment; whether the kill came before the end."""
    with process(world, output) as (pid, pipe):
        for letter in letters(pipe):
            if letter == moment.letter:
                if moment.number == 0:
                    time.sleep(moment.delay)
                    os.kill(pid, signal.SIGKILL)
                    break
                moment.number -= 1
        return ended_by(pid) == -signal.SIGKILL


def trial(world: str, folder: Path, moment: Moment, expected: bytes) -> dict | None:
    """One kill and what came of it; `None` if the run had ended before."""
    if not kill(world, folder, moment):
        return None
    complete = [checkpoint for checkpoint in checkpoints(folder) if why_incomplete(checkpoint) is None]
    found = {
        "kind": moment.kind,
        "resumed_from": int(complete[0].name.split("-")[1]) if complete else 0,
        "torn": (folder / STAGING).exists(),
        "checkpoints_that_are_not_complete": len(checkpoints(folder)) - len(complete),
        "in_a_rollout": bool(complete) and any(complete[0].glob("rollout_*")),
    }
    whole_run(world, folder, resume=bool(complete))
    return found | {"equal": weights(folder) == expected}


def trial_before_the_end(world: str, folder: Path, moment: Moment, expected: bytes) -> dict:
    """
    One kill and what came of it, sooner after its letter each time that the run had ended before.

    The moment is drawn from the times of an earlier run, and a run under less load is over sooner. Every letter comes
    before the end, so that some delay is short enough.
    """
    for halvings in range(ATTEMPTS):
        sooner = replace(moment, delay=moment.delay / 2**halvings)
        if found := trial(world, Path(tempfile.mkdtemp(dir=folder)), sooner, expected):
            return found
    raise SystemExit(f"{world}: {ATTEMPTS} runs had ended before they could be killed at {moment}")


def run(world: str, kills: int, seed: int, folder: Path) -> list[dict]:
    """All trials of one world, each in a folder of its own."""
    random_state = random.Random(f"{world} {seed}")
    times = whole_run(world, folder / "uninterrupted")
    expected, results = weights(folder / "uninterrupted"), []
    for number in range(kills):
        moment = draw(list(SPANS)[number % len(SPANS)], times, random_state)
        found = trial_before_the_end(world, folder, moment, expected)
        results.append(found)
        print(json.dumps({"world": world, "number": number} | found), flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each world")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the clock has a say too")
    args = parser.parse_args(argv)
    lines, failures = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for world in args.worlds:
            results = run(world, args.kills, args.seed, Path(folder, world))
            equal = sum(result["equal"] for result in results)
            failures += args.kills - equal
            lines.append(
                f"{world}: {equal} of {args.kills} equal bit for bit; killed while a checkpoint was being written: "
                f"{sum(result['torn'] for result in results)}, resumed in the midst of a rollout: "
                f"{sum(result['in_a_rollout'] for result in results)}, killed before the first checkpoint: "
                f"{sum(result['resumed_from'] == 0 for result in results)}"
            )
    print("\n".join(lines))
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
