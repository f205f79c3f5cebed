"""
The front of a quality and a diversity model of the shipped music base: evaluated beside the base and its guidance.

    python benchmarks/gpu/front.py --ends outputs/quality outputs/diversity

64 held-out prompts with 8 samples each; `trl-drcd evaluate` on the judges of recipes/music/evaluate_music.yaml.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.grid import evaluate
from trl_drcd.validation.yaml_files import read_yaml

MODELS = Path("recipes/tiny_music/models")


def main(argv: list[str] | None = None) -> None:
    """Evaluates into a folder, whose report.html shows the front."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", nargs=2, required=True, help="folders of the quality and of the diversity model")
    parser.add_argument("--output", default="outputs/gpu_front", help="folder of the evaluation")
    parser.add_argument("--small", action="store_true", help="few prompts and short samples, for a CPU")
    args = parser.parse_args(argv)
    quality, diversity = args.ends
    coefficient = read_yaml("recipes/music/musiclm_diversity.yaml")["diversity_coef"]
    arguments = EvaluateArguments(
        model=str(MODELS / "musiclm"),
        codec=str(MODELS / "codec"),
        embedder=str(MODELS / "embedder"),
        second_embedder=str(MODELS / "descriptors"),
        judge=str(MODELS / "judge"),
        dataset="recipes/tiny_music/data/test_prompts.jsonl",
        output_dir=args.output,
        num_prompts=64,
        samples_per_prompt=8,
        strategies=[
            {"name": "base"},
            {"name": "CFG", "guidance_scale": [1.5, 2, 3, 5]},
            {"name": "quality", "model": quality, "diversity_coef": 0},
            {"name": "diversity", "model": diversity, "diversity_coef": coefficient},
            {"name": "LERP", "models": [quality, diversity], "interpolation_weight": [0.2, 0.4, 0.6, 0.8]},
        ],
    )
    if args.small:
        strategies = [{"name": "base"}, {"name": "LERP", "models": args.ends, "interpolation_weight": 0.5}]
        arguments = replace(
            arguments, num_prompts=2, samples_per_prompt=2, max_new_tokens=24, strategies=strategies, listen=1
        )
    evaluate(arguments)


if __name__ == "__main__":
    main()
