"""Select the files of a folder to upload, by an allowlist."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Literal

from trl_drcd.files import own_file
from trl_drcd.merging.cards import RECORD
from trl_drcd.merging.folders import ADAPTER_FILES, CODEC, SIDE_FILES, listed
from trl_drcd.validation.saved_files import INDEX, WEIGHTS, open_safetensors, read_json, weight_files

Kind = Literal["model", "adapter", "codec", "audio model"]
CARD, PLOT, SAMPLES = "README.md", "front.png", "samples/samples.jsonl"
RECORDS = (RECORD, "lerp.yaml")
EARLIER = (
    *("config.json", INDEX, PLOT, "samples/*", *RECORDS, *ADAPTER_FILES),
    *(name for group in SIDE_FILES for name in group),
)
SOUNDS = {".wav", ".flac", ".mp3", ".ogg"}
PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-][\w.-]*\.(?:png|jpe?g))\)")


def kind_of(folder: Path) -> Kind:
    """
    Kind of a folder: a model, a PEFT adapter, a codec, or an embedder or judge of this package ("audio model").

    Raises:
        FileNotFoundError: If the folder does not exist, or has neither `config.json` nor `adapter_config.json`.
        ValueError: If it has both, or one is broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder={folder}` is not a folder; give the folder of a saved model or adapter")
    adapter = own_file(folder, ADAPTER_FILES[0])
    if adapter and own_file(folder, "config.json"):
        raise ValueError(f"`folder={folder}` has both a model and an adapter; separate them, and push each")
    if adapter:
        return "adapter"
    if not own_file(folder, "config.json"):
        raise FileNotFoundError(
            f"`folder={folder}` has neither config.json nor adapter_config.json; give the folder of a saved model or "
            "adapter"
        )
    config = read_json(folder / "config.json")
    return "codec" if "codec_type" in config else "audio model" if "model_class" in config else "model"


def files_to_push(folder: str | Path) -> dict[str, Path]:
    """
    Select the files of a folder to upload.

    These are weights in safetensors, configurations, tokenizer, chat template, processor, adapter, codec, the card and
    its pictures, the plot of a front (`front.png`), the record of a merge, and the samples listed in
    `samples/samples.jsonl`. All other files, such as checkpoints, optimizer and random states, logs and pickles, are
    left out.

    Args:
        folder (`str` or `Path`): Folder of a model, adapter, codec, embedder or judge.

    Returns:
        `dict[str, Path]`: Path in the repository, with `/`, to the file.

    Raises:
        FileNotFoundError: If the folder holds no model, or no weights in safetensors.
        ValueError: If a file is broken or a link out of the folder.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    names = ["config.json", *_weights(folder, kind), CARD, PLOT, *RECORDS, *_pictures(folder), *_samples(folder)]
    if kind in ("model", "adapter"):
        names += [ADAPTER_FILES[0], *listed(folder, [name for group in SIDE_FILES for name in group])]
    found = {name: path for name in names if (path := own_file(folder, name)) is not None}
    for name in found:
        if name.endswith(".safetensors"):
            open_safetensors(folder / name)
    return dict(sorted(found.items()))


def left_out(folder: Path, files: dict[str, Path]) -> list[str]:
    """Top-level entries of a folder that are not uploaded; folders end with `/`."""
    tops = {PurePath(name).parts[0] for name in files}
    others = (path for path in folder.iterdir() if path.name not in tops)
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def is_replaced(name: str) -> bool:
    """
    Whether a file of an earlier push is deleted if the new push does not have it: all that would be loaded together
    with the new weights, such as the configuration of an adapter, and what tells of others.
    """
    return name.endswith(".safetensors") or any(fnmatch(name, pattern) for pattern in EARLIER)


def _weights(folder: Path, kind: Kind) -> list[str]:
    needed = {
        "adapter": lambda: [ADAPTER_FILES[1]],
        "codec": lambda: [PurePath(CODEC[1]).name],
        "audio model": lambda: ["model.safetensors"],
        "model": lambda: weight_files(folder),
    }[kind]()
    for name in needed:
        own_file(folder, name)
        open_safetensors(folder / name)  # fails before the upload if it is broken, missing or a pickle
    sharded = kind == "model" and needed != [WEIGHTS]
    more = ["reference.safetensors"] if kind == "audio model" else [INDEX] if sharded else []
    return [*needed, *more]


def _pictures(folder: Path) -> list[str]:
    """Pictures in the folder that the card shows."""
    card = own_file(folder, CARD)
    return PICTURE.findall(card.read_text(encoding="utf-8")) if card else []


def _samples(folder: Path) -> list[str]:
    """`samples/samples.jsonl` and the audio files that it lists."""
    return [SAMPLES, *(f"samples/{row['file']}" for row in read_samples(folder) if "file" in row)]


def read_samples(folder: Path) -> list[dict[str, object]]:
    """
    Read `samples/samples.jsonl`: `prompt`, and `completion` or the `file` of audio; empty without the file.

    Raises:
        ValueError: If a line is not a JSON object, or names a file that is not audio in the same folder.
    """
    file = own_file(folder, SAMPLES)
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file else [], 1):
        try:
            row = json.loads(line)
            name = row.get("file", "x.wav")
            if PurePath(name).name != name or "\\" in name or PurePath(name).suffix not in SOUNDS:
                raise ValueError(f"it names the file {name!r}")
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is not a sample ({error}); it must be an object with `prompt`, and "
                f"`completion` or the `file` of audio in the same folder ({', '.join(sorted(SOUNDS))})"
            ) from error
        rows.append(row)
    return rows
