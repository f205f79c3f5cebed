"""What a training run says when it stops: after how many updates, why, and what there is to resume from."""

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
    Says of a bad batch, and of a process that is lost, where the run was and how to go on.

    Args:
        updates (`Callable`): Number of updates done.
        keep_last_state (`Callable`): Makes a checkpoint of the state after the last update; says where it is.
        on_bad_batch (`str`): `"stop"` or `"skip"`.
        timeout (`float`): Seconds that a process waits for the others.

    Raises:
        BadBatchError, RuntimeError: With the exception of the body as their cause.
    """
    try:
        yield
    except BadBatchError as error:
        remedy = "" if on_bad_batch == "skip" else "; `on_bad_batch='skip'` leaves such updates out"
        raise BadBatchError(f"After {updates()} updates: {error}. {keep_last_state()}{remedy}") from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise RuntimeError(
            f"After {updates()} updates, process {PartialState().process_index} has lost another process, which ended "
            f"or did not answer for {timeout} s (`ddp_timeout`). What each did last: {last_statuses()}. "
            "`resume_from_checkpoint=True` goes on from the newest checkpoint"
        ) from error
