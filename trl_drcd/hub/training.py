"""`push_to_hub=True`: the finished model of a training run, by the rules of `trl-drcd push`."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from trl_drcd.hub.push import push_to_hub
from trl_drcd.hub.upload import check_target


def check_run_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """
    Check, before training, that the model can be pushed at its end.

    Args:
        args (`TrainingArguments`): `hub_model_id`, or the name of `output_dir`; `hub_private_repo`, `hub_token`.
        token (`str`, *optional*): In place of `hub_token`.
        private (`bool`, *optional*): In place of `hub_private_repo`, which must be `False` for a public repository.

    Returns:
        `str`: `owner/name`.

    Raises:
        FileExistsError, PermissionError, ConnectionError, OSError: If the name is taken, or the Hub refuses.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    public = (args.hub_private_repo if private is None else private) is False
    return check_target(name, public, token or args.hub_token)


def push_run(args: TrainingArguments, repo_id: str, token: str | None = None) -> str:
    """
    Push the model in `output_dir`; arguments as for [`check_run_repository`].

    Returns:
        `str`: Address of the repository.
    """
    public, token = args.hub_private_repo is False, token or args.hub_token
    address = push_to_hub(str(args.output_dir), repo_id, public=public, token=token)
    assert address is not None  # which only a dry run has not
    return address
