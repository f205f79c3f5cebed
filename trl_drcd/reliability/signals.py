"""SIGTERM and Ctrl-C in a training: the update under way is finished, a checkpoint is written, the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState

STOPS = (signal.SIGTERM, signal.SIGINT)


class SignalStop(TrainerCallback):
    """
    Ends a training at SIGTERM or SIGINT, on all processes after the same update, with a checkpoint.

    A second Ctrl-C ends it at once; further SIGTERMs, which launchers send along with that of the system, do nothing.

    Args:
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._received = 0
        self.stopped_by = 0  # the signal after which all processes have stopped

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, signals are noted; what came too late to stop an update acts as it did before."""
        self._received = self.stopped_by = 0
        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._received and not self.stopped_by:
            signal.raise_signal(self._received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._received and self.accelerator.is_main_process:
            more = ". Ctrl-C once more ends it at once" if number == signal.SIGINT else ""
            print(f"{signal.Signals(number).name}: training ends after this update{more}", file=sys.stderr)
        self._received = self._received or number

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stops, where any process has received a signal."""
        self.stopped_by = self._received
        if self.accelerator.num_processes > 1:
            here = torch.tensor([self._received], device=self.accelerator.device)
            self.stopped_by = int(self.accelerator.gather(here).max())
        if self.stopped_by:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def end(self, updates: int, kept: str) -> None:
        """
        Ends the process if a signal has stopped the training: with one line, from the first process.

        Args:
            updates (`int`): Done so far.
            kept (`str`): Where the state is.

        Raises:
            SystemExit: With the status of a process that SIGTERM has ended, 143.
            KeyboardInterrupt: After Ctrl-C.
        """
        if not self.stopped_by:
            return
        name = signal.Signals(self.stopped_by).name
        line = f"Ended by {name} after {updates} updates. {kept}"
        if self.accelerator.is_main_process:
            print(line, file=sys.stderr)
        raise KeyboardInterrupt(line) if self.stopped_by == signal.SIGINT else SystemExit(128 + self.stopped_by)
