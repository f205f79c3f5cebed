"""
The command line.

    trl-drcd train music --config run.yaml
    trl-drcd merge --quality QUALITY --diversity DIVERSITY --interpolation_weight 0.5 --out MERGED
    trl-drcd evaluate --config front.yaml
    trl-drcd push FOLDER OWNER/NAME --dry_run
    trl-drcd COMMAND --help
    trl-drcd --version
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

import trl_drcd
from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import one_line_errors

SCRIPTS = Path(__file__).parent / "scripts"
TRAINERS = {"music": "train_music", "text": "train_text"}
# Its launcher, which without a configuration of its own would list arguments that `trl-drcd train` does not take
ACCELERATE = (
    "import logging; logging.getLogger('accelerate.commands.launch').setLevel(logging.ERROR); "
    "from accelerate.commands.accelerate_cli import main; main()"
)


@dataclass
class MergeArguments:
    """Arguments of `trl-drcd merge`; they can also be read from a file with `--config FILE.yaml`."""

    out: str = field(metadata={"help": "Folder to write."})
    quality: str | None = field(default=None, metadata={"help": "Model, or LoRA adapter, at lambda 0."})
    diversity: str | None = field(
        default=None, metadata={"help": "Model, or LoRA adapter, at lambda 1; for adapters `base` is the base model."}
    )
    interpolation_weight: float | None = field(
        default=None,
        metadata={"help": "lambda: (1 - lambda) quality + lambda diversity, or of two models; 0.5 by default."},
    )
    models: list[str] | None = field(
        default=None, metadata={"help": "Any number of models or adapters, in place of quality and diversity."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Their weights, which sum to 1; equal ones by default."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Data type of the merged model, where the models differ in it."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Adapters: merge the result into this model, write a full checkpoint."}
    )
    svd_rank: int | None = field(
        default=None, metadata={"help": "Adapters: compress to this rank; the error is printed."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a folder that is not empty."})

    def __post_init__(self) -> None:
        check_types(self)


def ends(arguments: MergeArguments) -> tuple[list[str], list[float]]:
    """
    Models and weights, from `quality` and `diversity` or from `models` and `weights`, by default equal ones.

    Raises:
        ValueError: If neither is complete, both are given, or weights and a lambda that is not of two models.
    """
    from trl_drcd.merging.blend import check_weights, two_weights

    two = [model for model in (arguments.quality, arguments.diversity) if model]
    if arguments.models:
        if two:
            raise ValueError("give `models`, with or without `weights`, or `quality` and `diversity`, not both")
        count, weight = len(arguments.models), arguments.interpolation_weight
        if weight is not None:
            if count != 2 or arguments.weights is not None:
                raise ValueError(
                    f"`interpolation_weight={weight}` is lambda of two models without `weights`; give `weights`, one "
                    f"for each of the {count} models, or leave it out"
                )
            return arguments.models, two_weights(weight)
        weights = [1 / count] * count if arguments.weights is None else arguments.weights
        return arguments.models, check_weights(weights, count)
    if len(two) != 2 or arguments.weights:
        raise ValueError("give `quality` and `diversity`, with `interpolation_weight`; or `models`, with `weights`")
    return two, two_weights(0.5 if arguments.interpolation_weight is None else arguments.interpolation_weight)


def merge(argv: list[str]) -> None:
    """
    Interpolate checkpoints (by mergekit) or LoRA adapters; load what was written, and generate from it. The same
    arguments can stand in a YAML file: --config FILE.yaml.
    """
    from trl import TrlParser

    kind: Any = MergeArguments
    parser = TrlParser(kind, prog="trl-drcd merge", description=merge.__doc__, allow_abbrev=False)
    (arguments,) = parse_command_line(parser, argv)
    from trl_drcd.merging import interpolate_adapters, interpolate_checkpoints, merge_with_mergekit
    from trl_drcd.merging.folders import find_folder, recorded_base
    from trl_drcd.merging.mergekit import mergekit_reads

    models, weights = ends(arguments)
    adapters = [(find_folder(model) / "adapter_config.json").is_file() for model in models if model != "base"]
    if all(adapters):
        if arguments.dtype:
            raise ValueError(f"`dtype={arguments.dtype}` is for full checkpoints; adapters are stored in float32")
        errors = interpolate_adapters(
            models, weights, arguments.out, arguments.svd_rank, arguments.base_model, arguments.overwrite, verify=True
        )
        if arguments.svd_rank:
            print(f"Relative error of the compression: {errors['total']:.3g}")
        base = recorded_base(Path(arguments.out))
        if not arguments.base_model and not (base and Path(base).is_dir()):
            print(f"Not loaded: the base model {base} is not here")
    elif any(adapters):
        raise ValueError("`models` mixes checkpoints and adapters; merge each adapter into its base first")
    else:
        if arguments.svd_rank or arguments.base_model:
            raise ValueError("`svd_rank` and `base_model` are for LoRA adapters, and these are checkpoints")
        readable = all(mergekit_reads(find_folder(model)) for model in models if model != "base")
        run = merge_with_mergekit if readable else interpolate_checkpoints
        run(models, weights, arguments.out, arguments.dtype, arguments.overwrite, verify=True)
    print(f"Merged: {arguments.out}")


def train(argv: list[str]) -> None:
    """`accelerate launch` the training script for music or text with the remaining arguments."""
    if not argv or argv[0] not in TRAINERS:
        print(
            "usage: trl-drcd train {music,text} [--config FILE.yaml] [--ARGUMENT VALUE ...]\n\n"
            "  music   a text-to-music model: a causal LM over audio tokens, a MusicGen, or a Dia (speech)\n"
            "  text    a causal language model\n\n"
            "`trl-drcd train music --help` and `trl-drcd train text --help` say more"
        )
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    script, words = TRAINERS[argv[0]], argv[1:]
    if {"-h", "--help", "--help_all"} & set(words):
        import_module(f"trl_drcd.scripts.{script}").main(words)
        return
    from trl_drcd.compat.threads import own_cores
    from trl_drcd.launch.processes import run_job

    # `--quiet`: without accelerate's traceback, the script's own error is the last output
    launch = [sys.executable, "-c", ACCELERATE, "launch", "--quiet"]
    if "OMP_NUM_THREADS" not in os.environ:  # accelerate would set 1
        launch += ["--num_cpu_threads_per_process", str(own_cores())]  # which the script divides by its processes
    if status := run_job([*launch, str(SCRIPTS / f"{script}.py"), *words]):
        raise SystemExit(status)


def evaluate(argv: list[str]) -> None:
    """
    Sample and judge strategies (models, guidance, temperatures, interpolations) on held-out prompts: results.jsonl, a
    summary, plots and a page under `--output_dir`. What is in results.jsonl already is not done again. Strategies are
    listed in the YAML file of --config FILE.yaml, which may hold every other argument too; their keys stand below.
    """
    from trl import TrlParser

    from trl_drcd.compat.glibc import keep_freed_memory
    from trl_drcd.compat.threads import use_own_cores
    from trl_drcd.evaluation.arguments import EvaluateArguments, HelpFormatter, help_on_strategies
    from trl_drcd.evaluation.grid import evaluate as run

    kind: Any = EvaluateArguments
    parser = TrlParser(
        kind, prog="trl-drcd evaluate", usage="%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        description=cleandoc(str(evaluate.__doc__)), epilog=help_on_strategies(), allow_abbrev=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    (arguments,) = parse_command_line(parser, argv)
    keep_freed_memory()
    use_own_cores()
    run(arguments)
    print(f"Report: {arguments.output_dir}/report.html   (its tables: report.md; numbers: results.jsonl, summary.csv)")


def ratings(argv: list[str]) -> None:
    """Human ratings of an evaluation's samples; `trl-drcd ratings --help` lists the commands."""
    from trl_drcd.ratings.commands import main

    main(argv)


def app(argv: list[str]) -> None:
    """Browser app to play, listen and rate; or a static page of samples."""
    from trl_drcd.app.commands import main

    main(argv)


def push(argv: list[str]) -> None:
    """Upload a model, adapter, embedder, judge or codec to the Hub, with a complete card."""
    from trl_drcd.hub.commands import main

    main(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "merge": merge, "evaluate": evaluate, "app": app, "ratings": ratings,
    "push": push,
}  # fmt: skip
# What to do after a signal
REMEDIES = {
    "evaluate": "what is measured stays in results.jsonl; call this again to go on",
    "merge": "nothing is written; call this again",
    "push": "call this again: what the Hub has is not sent twice",
}


def main(argv: list[str] | None = None) -> None:
    """Run `trl-drcd COMMAND ...`; input errors are reported in one line."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "--version":
        print(f"trl-drcd {trl_drcd.__version__}")
        return
    if not words or words[0] not in COMMANDS:
        print(
            "usage: trl-drcd COMMAND ...; `trl-drcd COMMAND --help` says more, `trl-drcd --version` which it is\n\n"
            f"commands: {', '.join(COMMANDS)}"
        )
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else 2)
    from trl_drcd.launch.processes import end_on_signals

    if "OMP_WAIT_POLICY" not in os.environ:  # as in the scripts
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    program = f"trl-drcd {words[0]}"
    with end_on_signals(program, REMEDIES.get(words[0], "")), one_line_errors(program):
        COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    main()
