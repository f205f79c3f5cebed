"""
Float32 products of the shapes of a model's layers, by each library that torch has for them on a CPU.

`linear` is `torch.nn.functional.linear`, which calls MKL, and `oneDNN` the same product by that library; of the packed
ones the weight was rearranged for their kernel before. What the package takes: `trl_drcd/compat/products.py`. Giga
floating-point operations per second, medians of the rounds; the weights of a shape take turns, so that they are not in
the cache of one core alone.

    OMP_NUM_THREADS=1 python benchmarks/products.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from trl_drcd.compat.products import product_library
from trl_drcd.evaluation.tables import markdown_table

# Rows, inputs, outputs: a step of 32 sequences of the shipped model and of SmolLM2 with its head, and all of an update
SHAPES = ((32, 256, 256), (32, 256, 768), (32, 768, 256), (32, 576, 1536), (32, 576, 49152), (6400, 256, 768))
CACHED = 3e7  # entries of the weights of a shape together


def ways(x: torch.Tensor, weights: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Name to a product with the next weight."""
    rows, plain = len(x), itertools.cycle(weights)
    found: dict[str, Callable[[], object]] = {"linear": lambda: torch.nn.functional.linear(x, next(plain))}
    if product_library():
        mkl, onednn = torch.ops.mkl, torch.ops.mkldnn
        packed = itertools.cycle([(mkl._mkl_reorder_linear_weight(weight, rows), weight) for weight in weights])
        ours = itertools.cycle([onednn._reorder_linear_weight(weight, rows) for weight in weights])
        found |= {
            "MKL, packed": lambda: mkl._mkl_linear(x, *next(packed), None, rows),
            "oneDNN": lambda: onednn._linear_pointwise(x, next(plain), None, "none", [], ""),
            "oneDNN, packed": lambda: onednn._linear_pointwise(x, next(ours), None, "none", [], ""),
        }
    return found


@torch.no_grad()
def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each measures all ways")
    parser.add_argument("--operations", type=float, default=2e9, help="of each way in a round, at least one product")
    args = parser.parse_args()
    table = {}
    for rows, inputs, outputs in SHAPES:
        operations = 2 * rows * inputs * outputs
        count = max(1, int(args.operations / operations))
        weights = [torch.randn(outputs, inputs) for _ in range(max(1, min(12, int(CACHED / inputs / outputs))))]
        calls = ways(torch.randn(rows, inputs), weights)
        speeds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(count):
                    call()
                speeds[name].append(count * operations / (time.perf_counter() - start) / 1e9)
        medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
        table[f"{rows} x {inputs} x {outputs}"] = {name: f"{value:.0f}" for name, value in medians.items()}
    print(f"Gigaflops, {torch.get_num_threads()} thread, {torch.backends.cpu.get_cpu_capability()}\n")
    print(markdown_table(table))


if __name__ == "__main__":
    main()
