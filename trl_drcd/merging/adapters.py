"""
Exact linear interpolation of LoRA adapters.

The products `scaling * B @ A` are interpolated, not the factors: averaged factors would add cross terms `B_q @ A_d`.
Concatenated factors give the sum of the products exactly, with the sum of the ranks:

    A = [A_q; A_d],  B = [(1 - l) * s_q * B_q, l * s_d * B_d],  scaling 1.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tqdm import tqdm

from trl_drcd.merging.architecture import check_same_vocabulary
from trl_drcd.merging.blend import blend, check_weights
from trl_drcd.merging.cards import write_card, write_record
from trl_drcd.merging.folders import (
    ADAPTER_FILES,
    BASE,
    check_files,
    check_list,
    copy_side_files,
    find_folder,
    recorded_base,
    warn_of_different_bases,
    warn_of_other_base,
)
from trl_drcd.merging.into_base import write_into_base
from trl_drcd.merging.lora import PREFIX, Adapter, check_linear, load_adapter
from trl_drcd.merging.staging import new_folder
from trl_drcd.merging.verify import check_that_it_generates
from trl_drcd.validation.model_folders import check_model
from trl_drcd.validation.saved_files import weight_files

# Configuration entries that apply to an adapter as a whole; in some of them the order matters
AGREED = ("fan_in_fan_out", "bias", "modules_to_save", "ensure_weight_tying")
AGREED_IN_ORDER = ("trainable_token_indices", "layer_replication")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def interpolate_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    output_dir: str | Path,
    svd_rank: int | None = None,
    base_model: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> dict[str, float]:
    """
    Write the LoRA adapter whose change of the base weights is `sum_i weights[i] * scaling_i * B_i @ A_i`.

    Eq. (6) of https://huggingface.co/papers/2410.06084, for adapters of one base with any ranks, alphas and patterns,
    with or without rsLoRA; a module that an adapter lacks counts as zero. Biases of B, saved modules, embeddings and
    token rows are interpolated too. All modules of the result have the same rank `r`, the largest sum of ranks
    (smaller ones are padded with zeros), and `lora_alpha = r`, so the scaling is 1 in every loader. Factors are
    multiplied in float64 and stored in float32. If one weight is 1 and the others are 0, the result is a bit-exact
    copy of that adapter.

    Args:
        adapters (`Sequence[str | Path]`): Folders or Hub names of LoRA adapters. `"base"` stands for the base model
            itself, an adapter of zeros.
        weights (`Sequence[float]`): One per adapter; they sum to 1.
        output_dir (`str` or `Path`): Folder to write.
        svd_rank (`int`, *optional*): Compress every module to at most this rank with the truncated singular value
            decomposition of its product, the best approximation of that rank.
        base_model (`str` or `Path`, *optional*): Merge the interpolated adapter into this model and write the full
            checkpoint instead.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a folder that is not empty.
        verify (`bool`, *optional*, defaults to `False`): Load the result and generate from it before it appears; an
            adapter on the base that it records, if that is a folder.

    Returns:
        `dict[str, float]`: Relative error of the compression in the Frobenius norm, `||dW - dW_r|| / ||dW||`: of all
        modules together as `"total"`, and of each module by name; 0 where nothing was truncated.

    Raises:
        FileExistsError: If `output_dir` is not empty and `overwrite` is not set.
        FileNotFoundError: If a folder does not exist or holds no adapter.
        OSError: If the disk is too full or not writable.
        RuntimeError: If `verify` is set and the result does not load or generate.
        TypeError: If `adapters`, `weights` or `svd_rank` has the wrong type.
        ValueError: If the weights do not sum to 1, the adapters' tokenizers have different vocabularies, or they
            cannot be interpolated exactly; the message gives the reason.
    """
    check_list("adapters", adapters)
    values = check_weights(weights, len(adapters))
    _check_rank(svd_rank)
    named = [(str(adapter), weight) for adapter, weight in zip(adapters, values, strict=True)]
    found = _load_adapters(named)
    base_folder = find_folder(base_model, "base_model") if base_model else None
    if base_folder:
        check_files("base_model", base_folder)
        check_model("base_model", base_folder)
    used = [(found[name], weight) for name, weight in named if name != BASE and weight != 0]
    if not used:
        raise ValueError(f"`weights={values}` select only the base; give at least one adapter a weight other than 0")
    folders = [adapter.folder for adapter in found.values()]
    check_same_vocabulary(folders)
    warn_of_different_bases(folders)
    if base_model:
        for folder in folders:
            warn_of_other_base(folder, base_model)
    sources = [*folders, *([base_folder] if base_folder else [])]
    bases = [Path(base) for parent in folders if (base := recorded_base(parent)) and Path(base).is_dir()]
    with new_folder(output_dir, [*sources, *bases], overwrite, _needed_bytes(used, base_folder)) as folder:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            errors = write_adapter(Path(scratch) if base_folder else folder, used, svd_rank)
            if base_folder:
                write_into_base(Path(scratch), used, base_folder, folder)
        copy_side_files(sources, folder)
        write_record(folder, named, svd_rank=svd_rank, base_model=base_model)
        sections = ["## Compression", f"Relative error of the weight changes: {errors['total']:.3g}."] * bool(svd_rank)
        base = None if base_model else recorded_base(used[0][0].folder)
        path = None if Path(output_dir).is_absolute() else str(output_dir)  # as the base's may be, from here
        write_card(folder, Path(output_dir).resolve().name, named, folders, sections, base, path)
        if verify and base_model:
            check_that_it_generates(folder, called=Path(output_dir))
        elif verify and base and Path(base).is_dir():
            check_that_it_generates(Path(base), folder)
    return errors


def _check_rank(svd_rank: object) -> None:
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int)):
        raise TypeError(f"`svd_rank` must be an integer, got {svd_rank!r}")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"`svd_rank` must be at least 1, got {svd_rank}")


def _load_adapters(named: Sequence[tuple[str, float]]) -> dict[str, Adapter]:
    """
    Load the adapters, by the names that the user gave; the base is left out.

    Raises:
        ValueError: If `"base"` is ambiguous because a folder of that name holds an adapter.
    """
    if any(name == BASE for name, _ in named) and Path(BASE, "adapter_config.json").is_file():
        raise ValueError(
            f"`{BASE}` is ambiguous: it stands for the base model, but an adapter's folder has that name; give the "
            f"folder as `./{BASE}`"
        )
    return {
        name: load_adapter(find_folder(name, f"adapters[{number}]"), f"adapters[{number}]")
        for number, (name, _) in enumerate(named)
        if name != BASE
    }


def _needed_bytes(parents: Sequence[tuple[Adapter, float]], base: Path | None) -> int:
    """Bytes of the interpolated adapter in float32, and of the full checkpoint if there is a base."""
    adapters = sum(adapter.nbytes() for adapter, _ in parents)
    return adapters + (sum((base / file).stat().st_size for file in weight_files(base)) if base else 0)


def write_adapter(folder: Path, parents: Sequence[tuple[Adapter, float]], svd_rank: int | None) -> dict[str, float]:
    """Write the two files of the interpolated adapter; return the errors as [`interpolate_adapters`] does."""
    modules = sorted({module for adapter, _ in parents for module in adapter.factors})
    if len(parents) == 1 and parents[0][1] == 1 and svd_rank is None:
        for file in ADAPTER_FILES:
            shutil.copyfile(parents[0][0].folder / file, folder / file)
        return dict.fromkeys(["total", *(module.removeprefix(PREFIX) for module in modules)], 0.0)
    for adapter, _ in parents:
        check_linear(adapter.config, str(adapter.folder))
    check_agreement([adapter for adapter, _ in parents])
    tensors = blend_full(parents)

    factors, lost, norms = {}, {}, {}
    for module in tqdm(modules, desc="interpolate", unit="module"):
        a, b = stacked_factors(parents, module)
        factors[module], lost[module], norms[module] = truncated(a, b, svd_rank)
    tensors |= _padded(factors, {module for adapter, _ in parents for module in adapter.embeddings})
    biased = any(adapter.biases for adapter, _ in parents)
    if biased:
        tensors |= {f"{m}.lora_B.bias": blended_bias(parents, m, b.shape[0]) for m, (_, b) in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = max((a.shape[0] for a, _ in factors.values()), default=parents[0][0].config.r)
    merged_config([adapter for adapter, _ in parents], modules, rank, biased).save_pretrained(str(folder))

    def ratio(chosen: Sequence[str]) -> float:
        norm = sum(norms[module] for module in chosen)
        return (sum(lost[module] for module in chosen) / norm) ** 0.5 if norm else 0.0

    return {"total": ratio(modules)} | {module.removeprefix(PREFIX): ratio([module]) for module in modules}


def _padded(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], embeddings: Collection[str]
) -> dict[str, torch.Tensor]:
    """The factors under PEFT's names, in float32, padded with zeros to the largest rank."""
    rank = max((a.shape[0] for a, _ in factors.values()), default=0)
    tensors = {}
    for module, (a, b) in factors.items():
        suffixes = (
            ("lora_embedding_A", "lora_embedding_B") if module in embeddings else ("lora_A.weight", "lora_B.weight")
        )
        missing = rank - a.shape[0]
        pair = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        for suffix, factor in zip(suffixes, pair, strict=True):
            tensors[f"{module}.{suffix}"] = factor.float().contiguous()
    return tensors


def merged_config(adapters: Sequence[Adapter], modules: Sequence[str], rank: int, biased: bool) -> LoraConfig:
    """The configuration of an interpolated adapter: a single rank, scaling 1, all modules of its parents."""
    said = [{name: getattr(adapter.config, name) for name in TARGETS} for adapter in adapters]
    config = replace(
        adapters[0].config,
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        lora_bias=biased,
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
        loftq_config={},
        inference_mode=True,
    )
    if any(entry != said[0] for entry in said):
        config.target_modules = [module.removeprefix(PREFIX) for module in modules]
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def check_agreement(adapters: Sequence[Adapter]) -> None:
    """
    Check that the adapters agree in the entries that apply to an adapter as a whole.

    Raises:
        ValueError: If they differ, one has a convolution, or biases of B and an embedding would be combined, which
            PEFT cannot load.
    """
    first = adapters[0]
    for adapter in adapters:
        for name in (*AGREED, *AGREED_IN_ORDER):
            ours, theirs = getattr(first.config, name), getattr(adapter.config, name)
            pair = [sorted(x) if name in AGREED and isinstance(x, list | set) else x for x in (ours, theirs)]
            if pair[0] != pair[1]:
                raise ValueError(
                    f"the adapters differ in `{name}`: {ours} in {first.folder}, {theirs} in {adapter.folder}"
                )
        for module, factors in adapter.factors.items():
            if any(factor.ndim != 2 for factor in factors):
                raise ValueError(f"{module} of {adapter.folder} is a convolution; only linear layers are supported")
    if any(adapter.biases for adapter in adapters) and any(adapter.embeddings for adapter in adapters):
        raise ValueError(
            "one adapter has `lora_bias=True`, another changes an embedding: PEFT cannot load an adapter with both"
        )


def blend_full(parents: Sequence[tuple[Adapter, float]]) -> dict[str, torch.Tensor]:
    """
    Weighted sums of the tensors that replace tensors of the base.

    Raises:
        ValueError: If such a tensor is missing in an adapter, or the base itself is interpolated: the base's own value
            is not available here.
    """
    keys = sorted({key for adapter, _ in parents for key in adapter.full})
    share = sum(weight for _, weight in parents)
    for key in keys:
        lacking = [str(adapter.folder) for adapter, _ in parents if key not in adapter.full]
        lacking += [BASE] if abs(share - 1) > 1e-6 else []
        if lacking:
            raise ValueError(
                f"{key} replaces a tensor of the base, but {lacking[0]} has no such tensor to interpolate with; merge "
                "each adapter into the base first (`base_model`), then use `interpolate_checkpoints`"
            )
        if len({adapter.full[key].shape for adapter, _ in parents}) > 1:
            raise ValueError(f"{key} has different shapes: {[tuple(a.full[key].shape) for a, _ in parents]}")
    weights = [weight for _, weight in parents]
    tensors = {key: [adapter.full[key] for adapter, _ in parents] for key in keys}
    widest = {key: reduce(torch.promote_types, (tensor.dtype for tensor in each)) for key, each in tensors.items()}
    return {key: blend(each, weights, widest[key]) for key, each in tensors.items()}


def stacked_factors(parents: Sequence[tuple[Adapter, float]], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors `A (R, in)` and `B (out, R)`, float64, with `B @ A` the weighted sum of the parents' `scaling * B @ A`.

    Raises:
        ValueError: If the module has different sizes in the adapters.
    """
    having = [(adapter, weight) for adapter, weight in parents if module in adapter.factors]
    sizes = {(a.factors[module][0].shape[1], a.factors[module][1].shape[0]) for a, _ in having}
    if len(sizes) > 1:
        raise ValueError(
            f"{module} has different sizes (in, out) in the adapters: {sorted(sizes)}; give adapters of one base"
        )
    a = torch.cat([adapter.factors[module][0].double() for adapter, _ in having])
    b = torch.cat(
        [adapter.factors[module][1].double() * (w * adapter.scaling(module)) for adapter, w in having], dim=1
    )
    return a, b


def truncated(
    a: torch.Tensor, b: torch.Tensor, rank: int | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, float]:
    """
    The best low-rank factors, by the truncated singular value decomposition of `b @ a`.

    Args:
        a (`torch.Tensor`): Shape `(R, in)`, float64.
        b (`torch.Tensor`): Shape `(out, R)`, float64.
        rank (`int`, *optional*): Largest rank of the result; `None` keeps the factors.

    Returns:
        `tuple`: The factors `(a, b)`, the squared Frobenius norm of the truncated part, and that of the product.
    """
    if rank is None or a.shape[0] <= rank:
        return (a, b), 0.0, float(((b.T @ b) * (a @ a.T)).sum())
    # With b = Q_b R_b and a^T = Q_a R_a, the product has the singular values of the small matrix R_b R_a^T
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    factors = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    return factors, float(s[rank:].square().sum()), float(s.square().sum())


def blended_bias(parents: Sequence[tuple[Adapter, float]], module: str, size: int) -> torch.Tensor:
    """Weighted sum of `scaling * bias` of a module's B, shape `(out,)`, float32; zeros where there is none."""
    total = torch.zeros(size, dtype=torch.float64)
    for adapter, weight in parents:
        if module in adapter.biases:
            total += weight * adapter.scaling(module) * adapter.biases[module].double()
    return total.float()
