"""A job of several processes: signals reach all of them, and none outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Tells a process of a job that it has a parent to end with
IN_A_JOB = "TRL_DRCD_IN_A_JOB"
# Of prctl(2)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def run_job(command: Sequence[str]) -> int:
    """
    Run a program, with all processes that it starts, as one job.

    SIGTERM, SIGINT and SIGHUP are passed on to every process of it, as SIGTERM, which `accelerate` and others take
    without a traceback; a second signal kills them. Returns when the last one has ended. What is left when the program
    itself has ended, or this process is killed, is ended too (on Linux).

    Args:
        command (`Sequence[str]`): The program and its arguments.

    Returns:
        `int`: As a shell has it: the program's exit status, or 128 and the number of the signal.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_group(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    def stop_and_go_on(number: int, frame: FrameType | None) -> None:  # Ctrl-Z, and `fg`
        _signal_group(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _signal_group(process.pid, signal.SIGCONT)

    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # who has lost its parent becomes a child of this process, and can be awaited
    environment = os.environ | {IN_A_JOB: "1"}
    # A group of its own: a Ctrl-C in a terminal comes here alone, and is passed on once
    process = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_end_with_parent)
    handlers = dict.fromkeys(PASSED_ON, pass_on) | {signal.SIGTSTP: stop_and_go_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        status = _wait_for_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process.returncode = status
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def _wait_for_group(leader: int) -> int:
    """Waits for a process and then for what is left of its group, which is told to end; the first one's status."""
    status = 0
    while True:
        try:
            pid, code = os.waitpid(-leader, 0)
        except ChildProcessError:
            return status
        if pid == leader:
            status = os.waitstatus_to_exitcode(code)
            _signal_group(leader, signal.SIGTERM)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _prctl(option: int, value: int) -> None:
    """A setting of this process, on Linux; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def end_on_signals(program: str) -> Iterator[None]:
    """
    Ends a training script at SIGTERM or Ctrl-C with one line and the right exit status (143, 130).

    A trainer that trains handles them itself, and says in its line where the state is. In a job of [`run_job`] the
    script also ends with the process that started it.

    Args:
        program (`str`): What the user calls the script.
    """
    if os.environ.get(IN_A_JOB):
        _end_with_parent()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent's end, say, must not cut short what follows
        print(f"{program}: ended by SIGTERM", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:  # else the trainer has said more
            print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)
