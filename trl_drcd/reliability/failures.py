"""Error messages of a failed training run: number of updates, cause, and checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import PartialState

from trl_drcd.reliability.batches import BadBatchError
from trl_drcd.reliability.processes import is_lost_process, last_statuses


@contextmanager
def explained_failures(
    updates: Callable[[], int], keep_last_state: Callable[[], str], on_bad_batch: str, timeout: float
) -> Iterator[None]:
    """
    Add the number of updates and the way to resume to the errors of bad batches and lost processes.

    Args:
        updates (`Callable`): Returns the number of updates done.
        keep_last_state (`Callable`): Saves a checkpoint of the state after the last update, and returns a sentence
            with its path.
        on_bad_batch (`str`): `"stop"` or `"skip"`.
        timeout (`float`): Seconds that a process waits for the others.

    Raises:
        BadBatchError: In place of a `BadBatchError` of the body.
        RuntimeError: If another process was lost.
    """
    try:
        yield
    except BadBatchError as error:
        # A fault of the very first batch is seldom one of that batch alone
        remedy = "" if on_bad_batch == "skip" or not updates() else "; `on_bad_batch='skip'` leaves such updates out"
        raise BadBatchError(f"After {updates()} updates: {error}. {keep_last_state()}{remedy}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise RuntimeError(
            f"After {updates()} updates, process {PartialState().process_index} has lost another process, which ended "
            f"or did not answer for {timeout} s (`ddp_timeout`). What each did last: {last_statuses()}. "
            "`resume_from_checkpoint=True` goes on from the newest checkpoint"
        ) from error
