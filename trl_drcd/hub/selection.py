"""Which files of a folder are uploaded: those on a list, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Literal

from trl_drcd.files import own_file
from trl_drcd.merging.cards import RECORD
from trl_drcd.merging.folders import ADAPTER_FILES, CODEC, SIDE_FILES
from trl_drcd.validation.saved_files import INDEX, open_safetensors, read_json, weight_files

Kind = Literal["model", "adapter", "codec", "audio model"]
CARD, PLOT, SAMPLES = "README.md", "front.png", "samples/samples.jsonl"
RECORDS = (RECORD, "lerp.yaml")
SOUNDS = {".wav", ".flac", ".mp3", ".ogg"}
PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-][\w.-]*\.(?:png|jpe?g))\)")


def kind_of(folder: Path) -> Kind:
    """
    What a folder holds: a model, a PEFT adapter, a codec, or an embedder or judge of this package.

    Raises:
        FileNotFoundError: If there is no folder, or neither `config.json` nor `adapter_config.json` in it.
        ValueError: If both are there, or one is broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder={folder}` is not a folder; give the folder of a saved model or adapter")
    adapter = own_file(folder, ADAPTER_FILES[0])
    if adapter and own_file(folder, "config.json"):
        raise ValueError(f"`folder={folder}` has a model and an adapter in one; keep them apart, and push each")
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
    The files of a folder that are uploaded.

    Weights in safetensors, configurations, tokenizer, chat template, processor, adapter, codec, the card and its
    pictures, the plot of a front (`front.png`), the record of a merge, and the samples that `samples/samples.jsonl`
    names. Checkpoints, optimizer and random states, logs and pickles are on no list, and whatever else lies there is
    not either.

    Args:
        folder (`str` or `Path`): Of a model, adapter, codec, embedder or judge.

    Returns:
        `dict[str, Path]`: Path inside the repository, with `/`, to the file.

    Raises:
        FileNotFoundError: If the folder holds no model, or its weights are not there as safetensors.
        ValueError: If a file is broken, or a link out of the folder.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    names = ["config.json", *_weights(folder, kind), CARD, PLOT, *RECORDS, *_pictures(folder), *_samples(folder)]
    if kind in ("model", "adapter"):
        names += [ADAPTER_FILES[0], *(name for group in SIDE_FILES for name in group)]
    found = {name: path for name in names if (path := own_file(folder, name)) is not None}
    for name in found:
        if name.endswith(".safetensors"):
            open_safetensors(folder / name)
    return dict(sorted(found.items()))


def left_out(folder: Path, files: dict[str, Path]) -> list[str]:
    """Names of what lies at the top of a folder and is not uploaded, folders with a `/`."""
    tops = {PurePath(name).parts[0] for name in files}
    others = (path for path in folder.iterdir() if path.name not in tops)
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def is_replaced(name: str) -> bool:
    """
    Whether a file that an earlier push left in the repository goes where the new push has no such file: weights that
    would be loaded beside the new ones, and samples of other weights.
    """
    return name == INDEX or name.endswith(".safetensors") or name.startswith("samples/")


def _weights(folder: Path, kind: Kind) -> list[str]:
    needed = {
        "adapter": lambda: [ADAPTER_FILES[1]],
        "codec": lambda: [PurePath(CODEC[1]).name],
        "audio model": lambda: ["model.safetensors"],
        "model": lambda: weight_files(folder),
    }[kind]()
    for name in needed:
        own_file(folder, name)
        open_safetensors(folder / name)  # before the upload: torn, missing, or a pickle in its place
    more = ["reference.safetensors"] if kind == "audio model" else [INDEX] if len(needed) > 1 else []
    return [*needed, *more]


def _pictures(folder: Path) -> list[str]:
    """Pictures beside the card that it shows."""
    card = own_file(folder, CARD)
    return PICTURE.findall(card.read_text(encoding="utf-8")) if card else []


def _samples(folder: Path) -> list[str]:
    """`samples/samples.jsonl`, and the sounds that it names."""
    return [SAMPLES, *(f"samples/{row['file']}" for row in read_samples(folder) if "file" in row)]


def read_samples(folder: Path) -> list[dict[str, object]]:
    """
    The lines of `samples/samples.jsonl`: `prompt`, and `completion` or the `file` of a sound; none if there is none.

    Raises:
        ValueError: If a line is no JSON object, or names a file that is not a sound in the same folder.
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
                f"{file}, line {number} is no sample ({error}); it must be an object with `prompt`, and `completion` "
                f"or the `file` of a sound in the same folder ({', '.join(sorted(SOUNDS))})"
            ) from error
        rows.append(row)
    return rows
