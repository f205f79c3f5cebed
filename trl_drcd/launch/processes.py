"""Run several processes as one job: signals reach all of them, and none outlives the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Environment variable that tells a process of a job to end with its parent
IN_A_JOB = "TRL_DRCD_IN_A_JOB"
# Options of prctl(2)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def run_job(command: Sequence[str]) -> int:
    """
    Run a program and all processes that it starts as one job; return when the last one has ended.

    SIGTERM, SIGINT and SIGHUP are forwarded to every process of the job as SIGTERM, which `accelerate` and others
    handle without a traceback; a second signal kills them. Processes that remain when the program has ended, or when
    this process is killed, are terminated too (on Linux).

    Args:
        command (`Sequence[str]`): The program and its arguments.

    Returns:
        `int`: Exit status as in a shell: the program's, or 128 plus the number of the signal.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_group(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    def stop_and_go_on(number: int, frame: FrameType | None) -> None:  # Ctrl-Z, then `fg`
        _signal_group(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _signal_group(process.pid, signal.SIGCONT)

    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, which can then wait for them
    environment = os.environ | {IN_A_JOB: "1"}
    # In its own process group, so that Ctrl-C in a terminal reaches only this process, which forwards it once
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
    """Wait for a process, terminate and wait for the rest of its group, and return the status of the first."""
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
    """Call prctl(2) on Linux; do nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def end_on_signals(program: str, remedy: str = "") -> Iterator[None]:
    """
    End a program on SIGTERM or Ctrl-C with a one-line message and the exit status 143 or 130.

    During training the trainer handles these signals itself, and its message names the saved checkpoint. In a job of
    [`run_job`] the program also ends with the process that started it.

    Args:
        program (`str`): Name of the program in messages.
        remedy (`str`, *optional*): What to do next, for the message.
    """
    remedy = f": {remedy}" if remedy else ""
    if os.environ.get(IN_A_JOB):
        _end_with_parent()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM, as from the parent's end, must not interrupt
        print(f"{program}: ended by SIGTERM{remedy}", file=sys.stderr)
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # no other can set handlers
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:  # else the trainer has said more
            print(f"{program}: ended by SIGINT{remedy}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
