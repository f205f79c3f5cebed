"""A collection on the Hub that holds what belongs together: models, merges, adapters, data sets, and the paper."""

from __future__ import annotations

from typing import Literal

from trl_drcd.cards import PAPER
from trl_drcd.hub.client import attempt, hub_api, hub_errors
from trl_drcd.hub.upload import check_repo_id

LONGEST_TITLE = 59
"""Characters of a collection's title that the Hub takes."""


def check_title(title: str) -> None:
    """
    Refuse a title that the Hub would not take.

    Raises:
        ValueError: If it is empty or too long.
    """
    if not 0 < len(title.strip()) <= LONGEST_TITLE:
        raise ValueError(
            f"`collection={title}` must be a title of 1 to {LONGEST_TITLE} characters, got {len(title)}; give another"
        )


def add_to_collection(
    repo_id: str,
    title: str,
    *,
    public: bool = False,
    note: str | None = None,
    repo_type: Literal["model", "dataset"] = "model",
    token: str | None = None,
) -> str:
    """
    Put a repository into the collection of that title and owner, which is made where it is not there, with the paper.

    Whoever may not see a repository does not see it in a collection either. What is there already stays as it is.

    Args:
        repo_id (`str`): `owner/name`, on the Hub.
        title (`str`): Of the collection, which belongs to the repository's owner.
        public (`bool`, *optional*, defaults to `False`): Whether everybody sees a collection that is made now.
        note (`str`, *optional*): Shown beside the repository, such as the lambda of a merge.
        repo_type (`str`, *optional*): `"model"` or `"dataset"`.
        token (`str`, *optional*): That of the login if `None`.

    Returns:
        `str`: Address of the collection.

    Raises:
        ValueError: If the title is empty or too long.
        PermissionError, ConnectionError, OSError: If the Hub refuses or cannot be reached.
    """
    check_repo_id(repo_id)
    check_title(title)
    api = hub_api(token)
    with hub_errors(f"collection {title} of {repo_id}"):
        found = attempt(
            api.create_collection, title, namespace=repo_id.split("/")[0], private=not public, exists_ok=True
        )
        items = [(PAPER.rpartition("/")[2], "paper", None), (repo_id, repo_type, note)]
        for item, kind, text in items:
            attempt(api.add_collection_item, found.slug, item, kind, note=text, exists_ok=True)
    return f"{api.endpoint}/collections/{found.slug}"
