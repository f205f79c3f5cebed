"""
Who may import whom inside the package, read from the source.

A lower line of `ORDER` may import a higher one, never the reverse. A package stands for its modules, but for those
that have a line of their own; every module has a place.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_drcd

PACKAGE = Path(trl_drcd.__file__).parent
ORDER = [
    "compat",
    "precision",
    "files",
    "markdown",
    "locks",
    "validation",
    "prompts",
    "reliability.processes",
    "reliability.batches",
    "guidance",
    "heads",
    "losses",
    "diversity",
    "kernels",
    "mixture",
    "credit",
    "critic",
    "audio",
    "text",
    "sampling",
    "policies",
    "validation.sampler",
    "config",
    "callbacks",
    "validation.vllm",
    "validation.before_loading",
    "validation.once_loaded",
    "cards",
    "distributed",
    "validation.launch",
    "merging",
    "teacher",
    "validation.self_check",
    "gradient_snr",
    "objective",
    "diversity_term",
    "term_gradients",
    "monitoring",
    "reliability",
    "rollout",
    "evaluation",
    "hub",
    "trainer",
    "launch",
    "ratings",
    "app",
    "scripts",
    "cli",
]
# Not installed with the package alone: `trl_drcd.compat.extras.require` imports them where they are used.
OPTIONAL = {"torchaudio", "soundfile", "sentence_transformers", "matplotlib", "tensorboard", "gradio", "evalica"}
# Never imported by the library: its own surroundings, what only builds the recipes' data, and mergekit, which is run
# as a program because its licence is the LGPL.
FOREIGN = {"mergekit", "recipes", "benchmarks", "tests", "music21", "sklearn", "pytorch_metric_learning"}

FILES = sorted(PACKAGE.rglob("*.py"))


def rank(module: str) -> int:
    """Place of the package's module `"trl_drcd.x.y"` in the order: that of the longest line that it begins with."""
    parts = module.split(".")[1:]
    lines = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    place = next((line for line in lines if line in ORDER), None)
    assert place, f"{module} has no place in the import order"
    return ORDER.index(place)


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file of `package` imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(source: str, module: str, package: str) -> list[str]:
    found = []
    for line, name in imports(ast.parse(source), package):
        root, *rest = name.split(".")
        if root in OPTIONAL:
            found.append(f"{module}:{line} imports {root}: use trl_drcd.compat.extras.require where it is needed")
        elif root in FOREIGN:
            found.append(f"{module}:{line} imports {root}, which the library must not know")
        elif root == "trl_drcd" and rest:
            name = f"trl_drcd.{trl_drcd._MODULES.get(rest[0], '.'.join(rest))}"
            if rank(name) > rank(module):
                found.append(f"{module}:{line} imports {name}, which comes later")
    return found


@pytest.mark.parametrize("file", FILES, ids=[module_name(file) for file in FILES])
def test_imports_go_one_way(file):
    module = module_name(file)
    if module == "trl_drcd":
        return  # it offers everything, on first use
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(file.read_text(), module, package) == []


@pytest.mark.parametrize(
    ("statement", "module", "package"),
    [
        ("from trl_drcd.trainer import X", "trl_drcd.losses", "trl_drcd"),
        ("from trl_drcd import audio", "trl_drcd.guidance", "trl_drcd"),
        ("from trl_drcd import DiversityReward", "trl_drcd.guidance", "trl_drcd"),
        ("from . import config", "trl_drcd.audio.codecs", "trl_drcd"),
        ("from ..cli import main", "trl_drcd.policies.causal_lm", "trl_drcd.policies"),
        ("def f():\n    import trl_drcd.cli", "trl_drcd.evaluation.plots", "trl_drcd.evaluation"),
        ("import trl_drcd.guidance", "trl_drcd.compat.extras", "trl_drcd"),
        ("import matplotlib.pyplot as plt", "trl_drcd.evaluation.plots", "trl_drcd.evaluation"),
        ("from mergekit.merge import run_merge", "trl_drcd.merging", "trl_drcd"),
    ],
)
def test_the_check_finds(statement, module, package):
    assert len(violations(statement, module, package)) == 1


@pytest.mark.parametrize(
    ("statement", "module", "package"),
    [
        ("from trl_drcd.losses import X", "trl_drcd.trainer", "trl_drcd"),
        ("from trl_drcd import CFGDistillDiversityConfig", "trl_drcd.trainer", "trl_drcd"),
        ("from .causal_lm import X", "trl_drcd.policies", "trl_drcd.policies"),
        ("from ..config import X", "trl_drcd.trainer.sub", "trl_drcd.trainer"),
        ("import torch, trl", "trl_drcd.guidance", "trl_drcd"),
    ],
)
def test_the_check_allows(statement, module, package):
    assert violations(statement, module, package) == []
