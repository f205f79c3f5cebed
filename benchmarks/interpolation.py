"""
Setting lambda of a model in memory, against the functions of PEFT and PyTorch for it, in one run:

- two LoRA adapters: `set_interpolation_weight` against `add_weighted_adapter` (a new adapter per lambda), in time, and
  in the relative error of the weight change against (1 - l) * dW_q + l * dW_d in float64;
- full weights: `set_interpolation_weight` against the interpolation of two state dicts with `load_state_dict`.

    python benchmarks/interpolation.py
    python benchmarks/interpolation.py --model outputs/smollm2 --output benchmarks/results/interpolation_smollm2.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import local_name, write_text
from trl_drcd.merging import hold_checkpoints, set_interpolation_weight

SHIPPED = Path(__file__).parents[1] / "recipes" / "tiny_music" / "models" / "musiclm"


def with_adapters(path: str, rank: int) -> Any:
    """The model with adapters `q` and `d` on all its linear layers, their factors random."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config, adapter_name="q")
    model.add_adapter("d", config)
    return model.eval()


def error_of(model: Any, weight: float) -> float:
    """Relative error, Frobenius norm over all layers, of the active adapters' change of the weights."""
    lost = norm = 0.0
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        q, d = (2.0 * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() for name in ("q", "d"))
        wanted = (1 - weight) * q + weight * d
        got = sum(
            layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
            for name in model.active_adapters
        )
        lost, norm = lost + float((got - wanted).square().sum()), norm + float(wanted.square().sum())
    return (lost / norm) ** 0.5


def peft_way(model: Any, combination: str) -> Callable[[float], None]:
    """A new adapter for each lambda, in place of the last one."""

    def change(weight: float) -> None:
        if "mixed" in model.peft_config:
            model.delete_adapter("mixed")
        model.add_weighted_adapter(["q", "d"], [1 - weight, weight], "mixed", combination_type=combination)
        model.set_adapter("mixed")

    return change


def full_ways(path: str) -> dict[str, Callable[[float], None]]:
    """Both ways for full weights; the other end is the model with noise on it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path)
    quality = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diversity = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in quality.items()}
    hold_checkpoints(model, [quality, diversity])

    def reload(weight: float) -> None:
        model.load_state_dict({name: (1 - weight) * quality[name] + weight * diversity[name] for name in quality})

    return {
        "full weights: set_interpolation_weight": lambda weight: set_interpolation_weight(model, weight),
        "full weights: load_state_dict": reload,
    }


@torch.no_grad()
def main() -> None:
    """Times the ways in turn, round after round, and prints medians, ratios and errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="a causal LM")
    parser.add_argument("--rank", type=int, default=16, help="of both adapters")
    parser.add_argument("--rounds", type=int, default=5, help="each sets 21 lambdas, every way in turn")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    ours, *peft = (with_adapters(args.model, args.rank) for _ in range(3))
    ways = {
        "adapters: set_interpolation_weight": lambda weight: set_interpolation_weight(ours, weight),
        "adapters: add_weighted_adapter, cat": peft_way(peft[0], "cat"),
        "adapters: add_weighted_adapter, linear": peft_way(peft[1], "linear"),
    } | full_ways(args.model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, change in ways.items():
            for weight in np.linspace(0, 1, 21):
                start = time.perf_counter()
                change(float(weight))
                seconds[name].append(time.perf_counter() - start)

    errors = {}
    for name, model in zip(list(ways)[:3], (ours, *peft), strict=True):
        ways[name](0.3)
        errors[name] = error_of(model, 0.3)
    rows = {}
    for name, values in seconds.items():
        ours_of_kind = name.split(":")[0] + ": set_interpolation_weight"
        rows[name] = {
            "milliseconds": 1e3 * float(np.median(values)),
            "of ours": float(np.median(values) / np.median(seconds[ours_of_kind])),
            "error at 0.3": errors.get(name, ""),
        }
    print(f"{local_name(args.model)}, rank {args.rank}, medians of {21 * args.rounds}\n\n{markdown_table(rows)}")
    if args.output:
        write_text(
            args.output, json.dumps({"model": local_name(args.model), "rank": args.rank, "ways": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
