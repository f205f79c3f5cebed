"""Read and write safetensors checkpoints one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from trl_drcd.files import own_file
from trl_drcd.validation.saved_files import INDEX, WEIGHTS, open_safetensors, read_json, weight_files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]
Specs = Mapping[str, Spec]


class Checkpoint:
    """
    The tensors of a safetensors checkpoint, in one file or in shards, each read on access.

    Args:
        folder (`Path`): Folder of the checkpoint.

    Raises:
        FileNotFoundError: If it holds no safetensors checkpoint.
        ValueError: If a file is broken, lies outside the folder, or does not match the index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        handles = {name: open_safetensors(own_file(folder, name) or folder / name) for name in weight_files(folder)}
        self.files: dict[str, list[str]] = {name: list(handle.keys()) for name, handle in handles.items()}
        self._handles = {tensor: handles[name] for name, tensors in self.files.items() for tensor in tensors}
        if len(self._handles) < sum(map(len, self.files.values())):
            raise ValueError(f"{folder} has a tensor in two of its files; copy or save it again")
        if WEIGHTS not in self.files:
            listed = read_json(folder / INDEX)["weight_map"]
            if missing := sorted(listed.keys() - self._handles.keys()):
                raise ValueError(
                    f"{folder / INDEX} names {missing[0]}, which none of its files has; copy or save it again"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._handles)

    def spec(self, name: str) -> Spec:
        """Data type and shape of a tensor, without reading it."""
        view = self._handles[name].get_slice(name)
        dtype = DTYPES.get(view.get_dtype())
        if dtype is None:
            raise ValueError(f"{name} of {self.folder} has dtype {view.get_dtype()}; expected one of {list(DTYPES)}")
        return dtype, tuple(view.get_shape())


def size_of(specs: Specs) -> int:
    """Total size of the tensors, bytes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def write_safetensors(path: Path, specs: Specs, tensor_of: Callable[[str], torch.Tensor]) -> int:
    """
    Write a safetensors file with one tensor in memory at a time (`safetensors.torch.save_file` needs all of them).

    Args:
        path (`Path`): The file.
        specs (`Mapping`): Name of each tensor to its data type and shape.
        tensor_of (`Callable`): Returns the tensor of a given name; called once for each, in order of writing.

    Returns:
        `int`: Total size of the tensors, bytes.

    Raises:
        ValueError: If the data type or shape of a tensor is not that of its spec.
    """
    # As in the safetensors library: wide data types first, so that every tensor is aligned
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensor_of(name)
            if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {specs[name]}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end


def write_checkpoint(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    specs: Specs,
    tensor_of: Callable[[str], torch.Tensor],
) -> None:
    """
    Write shards and, unless there is only `model.safetensors`, their index.

    Args:
        folder (`Path`): Output folder.
        files (`dict`): Name of each shard to the names of its tensors.
        specs, tensor_of: As for [`write_safetensors`].
    """
    total = sum(
        write_safetensors(folder / file, {name: specs[name] for name in names}, tensor_of)
        for file, names in files.items()
    )
    if list(files) != [WEIGHTS]:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
