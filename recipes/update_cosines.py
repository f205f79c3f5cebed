"""
How alike are the weight updates of several runs of one base?

Prints the cosine similarities of their updates, over all weights together, and the norms of the updates: of LoRA
runs the merged updates `scaling * B @ A`, of whole models the differences to `--base`. Runs that differ only in the
seed would have 1 if their gradient had no noise.

    python recipes/update_cosines.py results/music/runs/beta0_s? results/music/runs/beta300_s?
    python recipes/update_cosines.py --base recipes/tiny_music/models/musiclm outputs/study/quality_s?
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.merging.adapters import check_agreement, stacked_factors
from trl_drcd.merging.checkpoints import check_specs, common_tensors
from trl_drcd.merging.folders import find_folder
from trl_drcd.merging.lora import load_adapter
from trl_drcd.merging.safetensors_files import Checkpoint
from trl_drcd.validation.messages import one_line_errors


def update_cosines(folders: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosine similarities of the updates of adapters, and their norms.

    Args:
        folders (`Sequence[Path]`): `N` folders with LoRA adapters of one base.

    Returns:
        `tuple`: Cosines, float64 `(N, N)`, and Frobenius norms, float64 `(N,)`, in the unit of the weights.

    Raises:
        FileNotFoundError: If a folder has no adapter.
        ValueError: If an adapter is broken, or not of the same base.
    """
    adapters = [load_adapter(Path(folder)) for folder in folders]
    check_agreement(adapters)
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in sorted({name for adapter in adapters for name in adapter.factors}):
        having = [i for i, adapter in enumerate(adapters) if module in adapter.factors]
        factors = {i: stacked_factors([(adapters[i], 1.0)], module) for i in having}
        # <B A, B' A'> = tr(A^T B^T B' A'), without the (out, in) matrices
        for i, (a, b) in factors.items():
            for j, (other_a, other_b) in factors.items():
                products[i, j] += ((b.T @ other_b) * (a @ other_a.T)).sum()
    return _cosines(products)


def model_update_cosines(folders: Sequence[Path], base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosine similarities of the differences of whole models to their base, and their norms.

    Args:
        folders (`Sequence[Path]`): `N` folders with models.
        base (`Path`): Folder of the model that they were trained from.

    Returns:
        `tuple`: As [`update_cosines`].

    Raises:
        FileNotFoundError: If a folder has no model.
        ValueError: If the models have different tensors.
    """
    start, *models = (Checkpoint(find_folder(folder)) for folder in (base, *folders))
    names = common_tensors([start, *models])
    check_specs([start, *models], names, any_float=True)
    products = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name in names:
        updates = torch.stack([(model[name].double() - start[name].double()).flatten() for model in models])
        products += updates @ updates.T
    return _cosines(products)


def _cosines(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and norms from inner products `(N, N)`."""
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms[None]), norms


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of LoRA adapters or models, at least two")
    parser.add_argument("--base", type=Path, help="that whole models were trained from; not for adapters")
    args = parser.parse_args(argv)
    with one_line_errors("update_cosines.py"):
        if len(args.models) < 2:
            raise ValueError(f"give at least two adapters or models, got {args.models}")
        cosines, norms = model_update_cosines(args.models, args.base) if args.base else update_cosines(args.models)
    names = [os.path.relpath(folder, os.path.commonpath(args.models)) for folder in args.models]
    table = {
        name: {other: f"{cosines[i, j]:.2f}" for j, other in enumerate(names)} | {"norm": f"{norms[i]:.2f}"}
        for i, name in enumerate(names)
    }
    print(markdown_table(table))


if __name__ == "__main__":
    main()
