"""Linear interpolation of full checkpoints, streamed tensor by tensor from file to file."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from trl_drcd.files import write_text
from trl_drcd.merging.architecture import SpecialToken, check_same_family
from trl_drcd.merging.blend import blend, check_weights
from trl_drcd.merging.cards import merge_recipe, special_token_section, write_card, write_record
from trl_drcd.merging.folders import JSON, check_list, copy_side_files, find_models
from trl_drcd.merging.safetensors_files import NAMES, Checkpoint, Specs, size_of, write_checkpoint
from trl_drcd.merging.staging import new_folder
from trl_drcd.merging.verify import check_that_it_generates
from trl_drcd.validation.saved_files import read_json


def interpolate_checkpoints(
    models: Sequence[str | Path],
    weights: Sequence[float],
    output_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> Path:
    """
    Write the model with the weights `sum_i weights[i] * theta_i`.

    `interpolate_checkpoints([quality, diversity], [1 - l, l], out)` is Eq. (6) of
    https://huggingface.co/papers/2410.06084.
    Sums are computed in float32 (float64 if a tensor is) and rounded to the models' own data type. If one weight is 1
    and the others are 0, the weights are a bit-exact copy of that model's. One tensor per model is in memory at a
    time. The folder gets the tokenizer, processor and codec of the first model that has them, a generation config with
    guidance off, and a model card; it appears under its name only when complete.

    Args:
        models (`Sequence[str | Path]`): Folders or Hub names of full checkpoints in safetensors; the tokenizer comes
            from the first that has one. `"base"` stands for the base model that the others record.
        weights (`Sequence[float]`): One per model; they sum to 1.
        output_dir (`str` or `Path`): Folder to write.
        dtype (`str`, *optional*): Data type of the result, such as `"float32"` or `"bfloat16"`. Required if the
            models' data types differ.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a folder that is not empty.
        verify (`bool`, *optional*, defaults to `False`): Load the result and generate from it before it appears.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: If `output_dir` is not empty and `overwrite` is not set.
        FileNotFoundError: If a model does not exist, or has no `config.json` or no safetensors.
        OSError: If the disk is too full or not writable.
        RuntimeError: If `verify` is set and the result does not load or generate.
        TypeError: If `models` or `weights` has the wrong type.
        ValueError: If the weights do not sum to 1, or the models do not match; the message says where.
    """
    return merge_folders(models, weights, output_dir, partial(_write_weights, dtype=dtype), dtype, overwrite, verify)


def _write_weights(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    weights: Sequence[float],
    folder: Path,
    dtype: str | None,
) -> None:
    """Write the weighted sums in the first model's shards, and its configuration."""
    first, wanted = checkpoints[0], wanted_dtype(dtype)
    specs = merged_specs(first, names, wanted)
    used = [(checkpoint, weight) for checkpoint, weight in zip(checkpoints, weights, strict=True) if weight != 0]
    with tqdm(total=len(names), desc="interpolate", unit="tensor") as bar:

        def tensor_of(name: str) -> torch.Tensor:
            bar.update()
            return _merged_tensor(used, name, specs[name][0]) if specs[name][0].is_floating_point else first[name]

        files = {file: [name for name in listed if name in specs] for file, listed in first.files.items()}
        write_checkpoint(folder, files, specs, tensor_of)


def _merged_tensor(used: Sequence[tuple[Checkpoint, float]], name: str, dtype: torch.dtype) -> torch.Tensor:
    """
    The weighted sum of one tensor.

    Raises:
        ValueError: If it is not finite.
    """
    merged = blend([checkpoint[name] for checkpoint, _ in used], [weight for _, weight in used], dtype)
    if not merged.isfinite().all():
        bad = [checkpoint.folder for checkpoint, _ in used if not checkpoint[name].isfinite().all()]
        where = f" in {bad[0]}" if bad else f", too large for {merged.dtype}"
        raise ValueError(f"{name} has NaN or infinite values{where}; merge models whose weights are finite")
    return merged


def merged_specs(first: Checkpoint, names: Sequence[str], wanted: torch.dtype | None) -> Specs:
    """Data types and shapes of the merged tensors: the first model's, with floats in the wanted data type."""
    own = {name: first.spec(name) for name in names}
    return {name: (wanted if wanted and t.is_floating_point else t, shape) for name, (t, shape) in own.items()}


def merge_folders(
    models: Sequence[str | Path],
    weights: Sequence[float],
    output_dir: str | Path,
    write_weights: Callable[[Sequence[Checkpoint], Sequence[str], Sequence[float], Path], None],
    dtype: str | None,
    overwrite: bool,
    verify: bool,
) -> Path:
    """
    Do everything of a merge of checkpoints except the weights; arguments as for [`interpolate_checkpoints`]. The
    configuration is that of the first model.

    `write_weights` is called with the models, the names of their common tensors, the weights, and the output folder.
    """
    check_list("models", models)
    values, wanted = check_weights(weights, len(models)), wanted_dtype(dtype)
    folders = find_models(models)
    tokens = check_same_family(folders)
    checkpoints = [Checkpoint(path) for path in folders]
    names = common_tensors(checkpoints)
    check_specs(checkpoints, names, any_float=wanted is not None)
    warn_of_distant_models(checkpoints, names)
    size = size_of(merged_specs(checkpoints[0], names, wanted))
    with new_folder(output_dir, folders, overwrite, size) as folder:
        write_weights(checkpoints, names, values, folder)
        # The first model's: mergekit takes that of any
        config = with_dtype(read_json(folders[0] / "config.json"), dtype)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        set_special_tokens(folder / "config.json", tokens)
        copy_side_files(folders, folder, {token.key: token.value for token in tokens if "." not in token.key})
        named = [str(model) for model in models]
        parents = list(zip(named, values, strict=True))
        write_record(folder, parents, dtype=dtype)
        recipe = f"For mergekit:\n\n```yaml\n{merge_recipe(named, values, dtype, names_only=True)}```"
        sections = [*special_token_section(tokens), "## Recipe", recipe]
        write_card(folder, Path(output_dir).resolve().name, parents, folders, sections)
        if verify:
            check_that_it_generates(folder, called=Path(output_dir))
    return Path(output_dir)


def set_special_tokens(config_file: Path, tokens: Sequence[SpecialToken]) -> None:
    """Set special tokens in a `config.json`."""
    config = read_json(config_file)
    for token in tokens:
        *path, name = token.key.split(".")
        entry = config
        for part in path:
            entry = entry[part]
        entry[name] = token.value
    if tokens:
        write_text(config_file, json.dumps(config, indent=2) + "\n")


def wanted_dtype(dtype: str | None) -> torch.dtype | None:
    """
    The floating-point data type called, for example, `"float32"`.

    Raises:
        ValueError: If there is none.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found in NAMES):
        known = [str(d).removeprefix("torch.") for d in NAMES if d.is_floating_point]
        raise ValueError(f"`dtype={dtype}` is unknown; expected one of {known}")
    return found


def with_dtype(config: dict[str, JSON], dtype: str | None) -> dict[str, JSON]:
    """A copy of a configuration, including nested ones, with this data type; unchanged if it is `None`."""
    if dtype is None:
        return config
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def common_tensors(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """
    Names of the tensors that all checkpoints have.

    Tied weights are usually stored once; if only some checkpoints also store the copy, it is left out.

    Raises:
        ValueError: If a checkpoint lacks a tensor that another has and that is not such a copy.
    """
    names = [name for name in checkpoints[0].names if all(name in other for other in checkpoints)]
    shared = set(names)
    for checkpoint in checkpoints:
        for name in checkpoint.names:
            if name not in shared and not _is_copy_of_another(checkpoint, name, names):
                lacking = next(other.folder for other in checkpoints if name not in other)
                raise ValueError(
                    f"the models have different tensors: {checkpoint.folder} has {name}, {lacking} does not"
                )
    return names


def _is_copy_of_another(checkpoint: Checkpoint, name: str, names: Sequence[str]) -> bool:
    spec, tensor = checkpoint.spec(name), checkpoint[name]
    if tensor.ndim < 2:  # vectors are often equal without being tied: the scales of norms
        return False
    tied = read_json(checkpoint.folder / "config.json").get("tie_word_embeddings", True)
    return bool(tied) and any(checkpoint.spec(n) == spec and torch.equal(checkpoint[n], tensor) for n in names)


def check_specs(checkpoints: Sequence[Checkpoint], names: Sequence[str], any_float: bool) -> None:
    """
    Compare shapes and data types of all tensors with the first checkpoint's, and values of integers and booleans,
    which cannot be averaged.

    Raises:
        ValueError: If one differs.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name in names:
            (dtype, shape), (their_dtype, their_shape) = first.spec(name), other.spec(name)
            where = f"{name} in {first.folder} and {other.folder}"
            if shape != their_shape:
                raise ValueError(f"different shapes of {where}: {shape} and {their_shape}")
            floats = dtype.is_floating_point and their_dtype.is_floating_point
            if dtype != their_dtype and not (any_float and floats):
                hint = '; set `dtype`, such as "float32"' if floats else ""
                raise ValueError(f"different data types of {where}: {dtype} and {their_dtype}{hint}")
            if not floats and not torch.equal(first[name], other[name]):
                raise ValueError(f"different values of {where}, which are {dtype} and cannot be averaged")


def warn_of_distant_models(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """
    Warn if the largest matrices of two models are nearly uncorrelated.

    Their cosine similarity is near 1 between fine-tuned versions of one model, and near 0 between models from
    different initialisations, whose average is meaningless.
    """
    first = checkpoints[0]
    matrices = [name for name in names if len(first.spec(name)[1]) > 1 and first.spec(name)[0].is_floating_point]
    if not matrices:
        return
    largest = max(matrices, key=lambda name: math.prod(first.spec(name)[1]))
    part = slice(2**24)  # enough for a precise cosine; limits the memory for large vocabularies
    ours = first[largest].flatten()[part].float()
    for other in checkpoints[1:]:
        cosine = float(torch.nn.functional.cosine_similarity(ours, other[largest].flatten()[part].float(), dim=0))
        if cosine < 0.5:
            warnings.warn(
                f"{largest} of {first.folder} and {other.folder} has a cosine similarity of {cosine:.2f}: do they "
                "come from one initialisation? Otherwise their average is meaningless",
                stacklevel=4,
            )
