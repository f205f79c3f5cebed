"""Copy ratings to a private data set on the Hub while a study runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_drcd.files import write_text
from trl_drcd.ratings.store import Study
from trl_drcd.ratings.tabular import ratings_csv

EVERY_MINUTES = 5


class Sync:
    """
    Copies a study's ratings, as `ratings.csv`, to a private data set on the Hub every 5 minutes.

    The database remains authoritative: a failed copy is retried, in the background.

    Args:
        study ([`Study`]): The study.
        repo_id (`str`): `user/name` of the data set, created if it does not exist.
        scheduler (*optional*): Replacement for `huggingface_hub.CommitScheduler` in tests.
    """

    def __init__(self, study: Study, repo_id: str, scheduler: Any = None) -> None:
        if scheduler is None:
            from huggingface_hub import CommitScheduler as scheduler
        self.study, self.folder = study, Path(study.folder) / "sync"
        self.folder.mkdir(exist_ok=True)
        self.scheduler = scheduler(
            repo_id=repo_id, repo_type="dataset", private=True, folder_path=self.folder, every=EVERY_MINUTES,
            allow_patterns="ratings.csv",
        )  # fmt: skip
        self.save()

    def save(self) -> None:
        """Write the file for the next commit."""
        with self.scheduler.lock:
            write_text(self.folder / "ratings.csv", ratings_csv(self.study))
