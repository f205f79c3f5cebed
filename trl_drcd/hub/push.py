"""Push a model, adapter, codec, embedder or judge to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_drcd.hub.cards import CardFacts, complete_card, has_license, merge_record, merged_from
from trl_drcd.hub.collections import add_to_collection, check_title
from trl_drcd.hub.metrics import eval_results, metrics_section, plot_of, result_of
from trl_drcd.hub.privacy import BASE_KEY, check_text, content_to_push
from trl_drcd.hub.samples import is_evaluation, prepare_samples
from trl_drcd.hub.selection import CARD, PLOT, files_to_push, kind_of, left_out
from trl_drcd.hub.upload import Upload, check_repo_id, send
from trl_drcd.validation.saved_files import read_json


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    command: str | None = None,
    results: str | Path | None = None,
    strategy: str | None = None,
) -> Upload:
    """
    Prepare the upload of [`push_to_hub`]; nothing is sent, and the folder is not changed.

    Arguments and errors are those of [`push_to_hub`].

    Returns:
        [`~trl_drcd.hub.upload.Upload`]: The files, with their contents on the Hub.
    """
    check_repo_id(repo_id)
    for name in base_model or ():
        check_repo_id(name)
    folder = Path(folder)
    if is_evaluation(folder):
        if unused := [name for name, value in {"results": results, "strategy": strategy}.items() if value]:
            raise ValueError(f"`folder={folder}` is an evaluation, whose samples are pushed; leave out `{unused[0]}`")
        return prepare_samples(folder, repo_id, public, license, base_model or ())
    files = files_to_push(folder)
    evaluation = None if results is None else Path(results)
    files |= plot_of(evaluation, list(files))
    found = None if evaluation is None else result_of(evaluation, folder, strategy)
    facts = CardFacts(
        repo_id=repo_id, base_model=base_model, license=license, datasets=datasets, command=command,
        evaluation=[] if found is None else eval_results(found),
        sections=[] if found is None else [metrics_section(found)], plot=PLOT in files,
    )  # fmt: skip
    card = complete_card(folder, facts)
    if public and not has_license(card):
        raise ValueError(f"`folder={folder}` has no licence in its card; set `license`, such as apache-2.0")
    check_text(CARD, str(card))
    adapter_base = base_model if kind_of(folder) == "adapter" else None
    contents: dict[str, bytes | Path] = {
        name: content_to_push(name, path, adapter_base) for name, path in files.items() if name != CARD
    }
    contents[CARD] = str(card).encode()
    return Upload(repo_id, dict(sorted(contents.items())), public, bases=_base_of_adapter(folder, adapter_base))


def _base_of_adapter(folder: Path, base_model: Sequence[str] | None) -> tuple[str, ...]:
    """Hub name of the base that an adapter needs."""
    if kind_of(folder) != "adapter":
        return ()
    recorded = read_json(folder / "adapter_config.json").get(BASE_KEY)
    return tuple(base_model) if base_model else (recorded,) if recorded else ()


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    command: str | None = None,
    results: str | Path | None = None,
    strategy: str | None = None,
    collection: str | None = None,
    token: str | None = None,
) -> str | None:
    """
    Push the folder of a model, adapter, merge, codec, embedder or judge to the Hub, with a complete card.

    The folder of an evaluation becomes a data set of the samples that it kept
    ([`~trl_drcd.hub.samples.prepare_samples`]).

    Only the files of [`~trl_drcd.hub.selection.files_to_push`] are uploaded: no checkpoint, optimizer state, pickle,
    log, link out of the folder, access token or local path. The local folder is not changed.

    Args:
        folder (`str` or `Path`): Folder written by `save_model`, `trl-drcd train` or `trl-drcd merge`.
        repo_id (`str`): Target repository, `owner/name`.
        public (`bool`, *optional*, defaults to `False`): Whether the repository is public.
        overwrite (`bool`, *optional*, defaults to `False`): Whether files of an existing repository may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Print every file with its size, and send nothing.
        base_model (`Sequence[str]`, *optional*): Hub names of the base model, or of the parents of a merge; required
            if the folder records them as local folders. For an evaluation, the models that were sampled.
        license (`str`, *optional*): Licence identifier such as `apache-2.0`; that of the card if `None`.
        datasets (`Sequence[str]`, *optional*): Hub names of the training data.
        command (`str`, *optional*): Command that produced the model, for the card.
        results (`str` or `Path`, *optional*): Folder or `results.jsonl` of an evaluation: its metrics with intervals
            become the card's `model-index`, and its `front.png` is shown.
        strategy (`str`, *optional*): Name of a row of `results`; by default the row of this model alone.
        collection (`str`, *optional*): Title of a collection of the same owner to add the repository and the paper
            to; created if needed ([`~trl_drcd.hub.collections.add_to_collection`]).
        token (`str`, *optional*): Access token; that of the login if `None`.

    Returns:
        `str`: URL of the repository; `None` after a dry run.

    Raises:
        FileNotFoundError, ValueError: If the folder holds no complete model, or contains something private.
        FileExistsError: If the repository has files and `overwrite` is not set.
        PermissionError, ConnectionError, OSError: If the Hub refuses or cannot be reached.
    """
    upload = prepare(
        folder, repo_id, public=public, base_model=base_model, license=license, datasets=datasets, command=command,
        results=results, strategy=strategy,
    )  # fmt: skip
    if collection is not None:
        check_title(collection)
    if dry_run:
        print(upload.listing())
        if others := left_out(Path(folder), dict.fromkeys(upload.files, Path())):
            print(f"Left out: {', '.join(others)}")
        return None
    address = send(upload, overwrite, token, f"Push by trl-drcd: {Path(folder).resolve().name}")
    if collection is not None:
        kind, note = upload.repo_type, _note(Path(folder))
        add_to_collection(repo_id, collection, public=public, note=note, repo_type=kind, token=token)
    return address


def _note(folder: Path) -> str | None:
    """The note of a merge of two models in a collection."""
    parents = merged_from(merge_record(folder))
    return f"lambda = {parents[1][1]:g}" if len(parents) == 2 else None
