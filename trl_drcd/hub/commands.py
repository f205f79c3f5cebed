"""`trl-drcd push`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types


@dataclass
class PushArguments:
    """Arguments of `trl-drcd push`; `--config FILE.yaml` reads them from a file."""

    folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the model, adapter, merge, embedder, judge, codec or evaluation to push."},
    )
    repo_id: str | None = field(default=None, metadata={"help": "Target repository, owner/name."})
    public: bool = field(default=False, metadata={"help": "Push to a public repository; by default it is private."})
    yes: bool = field(default=False, metadata={"help": "Replace files of an existing repository."})
    dry_run: bool = field(default=False, metadata={"help": "List every file with its size, and send nothing."})
    base_model: list[str] | None = field(
        default=None, metadata={"help": "Hub names of the base model, or of the parents of a merge."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence, such as apache-2.0; by default that of the folder's card."}
    )
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub names of the training data."})
    command: str | None = field(default=None, metadata={"help": "Command that produced the model, for the card."})
    results: str | None = field(
        default=None,
        metadata={"help": "Evaluation whose metrics and front the card shows: folder or results.jsonl."},
    )
    strategy: str | None = field(
        default=None, metadata={"help": "Name of a row of `results`; by default the row of this model alone."}
    )
    collection: str | None = field(
        default=None, metadata={"help": "Title of a collection to add it to, with the paper; created if needed."}
    )

    def __post_init__(self) -> None:
        check_types(self)


def with_names(argv: list[str]) -> list[str]:
    """Name the leading positional arguments `folder` and `repo_id`."""
    leading = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    if leading > 2:
        raise ValueError(f"unknown argument {argv[2]!r}; give FOLDER, OWNER/NAME, then arguments that start with `--`")
    named = [word for pair in zip(("--folder", "--repo_id"), argv[:leading], strict=False) for word in pair]
    return [*named, *argv[leading:]]


def main(argv: list[str]) -> None:
    """
    Upload the folder of a model, adapter, merge, embedder, judge or codec to the Hub, or the samples that an
    evaluation kept (as a data set), with a complete card. The repository is private unless `--public`; files are
    replaced only with `--yes`; only files that belong to it are sent. The token is that of `hf auth login` or
    HF_TOKEN. All arguments may be in a YAML file: --config FILE.yaml.
    """
    from trl import TrlParser

    kind: Any = PushArguments
    parser = TrlParser(
        kind, prog="trl-drcd push", usage="%(prog)s FOLDER OWNER/NAME [--ARGUMENT VALUE ...]",
        description=main.__doc__, allow_abbrev=False,
    )  # fmt: skip
    (arguments,) = parse_command_line(parser, with_names(argv))
    run(arguments)


def run(arguments: PushArguments) -> None:
    """
    Push as the arguments say.

    Raises:
        ValueError: If `folder` or `repo_id` is missing; otherwise as for [`~trl_drcd.hub.push.push_to_hub`].
    """
    from trl_drcd.hub.push import push_to_hub

    if arguments.folder is None or arguments.repo_id is None:
        raise ValueError("give `folder` and `repo_id`: trl-drcd push FOLDER OWNER/NAME")
    url = push_to_hub(
        arguments.folder, arguments.repo_id, public=arguments.public, overwrite=arguments.yes,
        dry_run=arguments.dry_run, base_model=arguments.base_model, license=arguments.license,
        datasets=arguments.datasets or (), command=arguments.command, results=arguments.results,
        strategy=arguments.strategy, collection=arguments.collection,
    )  # fmt: skip
    if url:
        print(f"Pushed: {url}")
