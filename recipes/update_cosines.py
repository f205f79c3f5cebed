"""
How alike are the weight updates of several LoRA runs of one base?

Prints the cosine similarities of their merged updates `scaling * B @ A`, over all adapted weights together, and the
norms of the updates. Runs that differ only in the seed would have 1 if their gradient had no noise.

    python recipes/update_cosines.py results/music/runs/beta0_s? results/music/runs/beta300_s?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.merging.adapters import check_agreement, stacked_factors
from trl_drcd.merging.lora import load_adapter
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
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms[None]), norms


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path, help="folders of LoRA adapters, at least two")
    args = parser.parse_args(argv)
    with one_line_errors("update_cosines.py"):
        if len(args.adapters) < 2:
            raise ValueError(f"give at least two adapters, got {args.adapters}")
        cosines, norms = update_cosines(args.adapters)
    names = [folder.name for folder in args.adapters]
    table = {
        name: {other: f"{cosines[i, j]:.2f}" for j, other in enumerate(names)} | {"norm": f"{norms[i]:.2f}"}
        for i, name in enumerate(names)
    }
    print(markdown_table(table))


if __name__ == "__main__":
    main()
