"""Upload files to a Hub repository in one commit; private by default, and without replacing files by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from trl_drcd.hub.client import attempt, hub_api, hub_errors
from trl_drcd.hub.selection import is_replaced

NEW = {".gitattributes"}
"""Files that the Hub itself adds to a new repository."""


@dataclass(frozen=True)
class Upload:
    """
    A prepared upload.

    Args:
        repo_id (`str`): Target repository, `owner/name`.
        files (`Mapping`): Path in the repository to a file, or to its content.
        public (`bool`): Whether the repository is public.
        repo_type (`str`): `"model"` or `"dataset"`.
        bases (`tuple[str, ...]`): Hub names of models that are required to load this one.
    """

    repo_id: str
    files: Mapping[str, bytes | Path]
    public: bool = False
    repo_type: Literal["model", "dataset"] = "model"
    bases: tuple[str, ...] = ()

    def listing(self) -> str:
        """List of the files with sizes in bytes, their sum, and the target repository."""
        sizes = {name: _size(content) for name, content in self.files.items()}
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        whom = "public" if self.public else "private"
        where = f"the {whom} {self.repo_type} {self.repo_id}"
        total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files, to {where}"
        return "\n".join([*lines, total])


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def check_repo_id(repo_id: str) -> None:
    """
    Check the name of a repository.

    Raises:
        ValueError: If it is not `owner/name`.
    """
    try:
        validate_repo_id(repo_id)
        known = repo_id.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise ValueError(f"`repo_id={repo_id}` is not a name on the Hub; give owner/name, such as user/my-model")


def check_target(name: str, public: bool = False, token: str | None = None) -> str:
    """
    Check that a new repository can be pushed to; nothing is sent.

    Args:
        name (`str`): `owner/name`, or only a name in the namespace of the token's owner.
        public (`bool`, *optional*, defaults to `False`): Whether the repository is to be public.
        token (`str`, *optional*): Access token; that of the login if `None`.

    Returns:
        `str`: `owner/name`.

    Raises:
        FileExistsError, PermissionError, ConnectionError, OSError: As for [`send`].
        ValueError: If the name is not valid.
    """
    api = hub_api(token)
    with hub_errors(f"push of {name}"):
        owner = attempt(api.whoami)["name"]
        repo_id = name if "/" in name else f"{owner}/{name}"
        check_repo_id(repo_id)
        _existing(api, Upload(repo_id, {}, public), overwrite=False)
    return repo_id


def send(upload: Upload, overwrite: bool = False, token: str | None = None, message: str = "Push") -> str:
    """
    Create the repository if it does not exist, and commit the files.

    An interrupted upload leaves an empty repository; the next call continues, and large files that the Hub already has
    are not sent again.

    Args:
        upload ([`Upload`]): What to send.
        overwrite (`bool`, *optional*, defaults to `False`): Whether files of an existing repository may be replaced.
        token (`str`, *optional*): Access token; that of the login if `None`.
        message (`str`, *optional*): Commit message.

    Returns:
        `str`: URL of the repository.

    Raises:
        FileExistsError: If the repository has files and `overwrite` is not set.
        FileNotFoundError: If the base model of an adapter is not on the Hub.
        PermissionError: If the Hub refuses the token, or the existing repository is public and `upload.public` is not
            set, or the reverse.
        ConnectionError, OSError: As for [`~trl_drcd.hub.client.hub_errors`].
    """
    check_repo_id(upload.repo_id)
    api = hub_api(token)
    with hub_errors(f"push of {upload.repo_id}"):
        attempt(api.whoami)
        there = _existing(api, upload, overwrite)
        _check_bases(api, upload)
        attempt(api.create_repo, upload.repo_id, repo_type=upload.repo_type, private=not upload.public, exist_ok=True)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in upload.files.items()
        ]
        gone = [CommitOperationDelete(name) for name in there if is_replaced(name) and name not in upload.files]
        # Before the commit and without `attempt`: the client retries each part by itself
        api.preupload_lfs_files(upload.repo_id, additions, repo_type=upload.repo_type)
        attempt(
            api.create_commit, upload.repo_id, [*additions, *gone], commit_message=message, repo_type=upload.repo_type
        )
    kind = "datasets/" if upload.repo_type == "dataset" else ""
    return f"{api.endpoint}/{kind}{upload.repo_id}"


def _existing(api: HfApi, upload: Upload, overwrite: bool) -> list[str]:
    """The files of an existing repository, if it may be written to; empty if it does not exist."""
    try:
        info = attempt(api.repo_info, upload.repo_id, repo_type=upload.repo_type)
    except RepositoryNotFoundError:
        return []
    names = [sibling.rfilename for sibling in info.siblings or []]
    if set(names) - NEW and not overwrite:
        raise FileExistsError(
            f"{upload.repo_id} is already on the Hub, with {len(set(names) - NEW)} files; give `--yes` to replace "
            "files of the same name, or give another name"
        )
    if not info.private and not upload.public:
        raise PermissionError(
            f"{upload.repo_id} is public; give `--public` if this push may be public, or give another name"
        )
    if info.private and upload.public:
        raise PermissionError(
            f"{upload.repo_id} is private, and `--public` does not change that; make it public in its settings on the "
            "Hub, or omit `--public`"
        )
    return names


def _check_bases(api: HfApi, upload: Upload) -> None:
    for base in upload.bases:
        try:
            attempt(api.repo_info, base)
        except RepositoryNotFoundError:
            raise FileNotFoundError(
                f"the base model {base} is not on the Hub, so {upload.repo_id} could not be loaded; push the base "
                "first, or give its name as `base_model`"
            ) from None
