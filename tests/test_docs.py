"""The documentation: lengths, links, commands, names and numbers that stand in it; the site."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify
from trl import ModelConfig

import trl_drcd.cli
from trl_drcd import CFGDistillDiversityConfig
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.metrics import METRICS
from trl_drcd.hub.commands import PushArguments
from trl_drcd.scripts.train_music import MusicArguments
from trl_drcd.scripts.train_text import TextArguments

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "recipes", "results", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))])
GENERATED = {"report.md", "claims.md", "results.md", "gate.md", "embedders.md"}
WRITTEN = [page for page in PAGES if page.name not in GENERATED]
PUBLIC_NAMES = [
    "trl_drcd.CFGDistillDiversityConfig",
    "trl_drcd.CFGDistillDiversityTrainer",
    "trl_drcd.DiversityReward",
    "trl_drcd.TeacherCFGLogitsProcessor",
    "trl_drcd.guidance.guide_logits",
    "trl_drcd.guidance.guide_hidden_states",
    "trl_drcd.losses.reverse_kl",
    "trl_drcd.diversity.pairwise_cosine_distance",
    "trl_drcd.diversity.group_diversity",
    "trl_drcd.diversity.diversity_advantages",
    "trl_drcd.merging.interpolate_checkpoints",
    "trl_drcd.merging.interpolate_adapters",
    "trl_drcd.merging.set_interpolation_weight",
    "trl_drcd.evaluation.pareto_front",
    "trl_drcd.evaluation.hypervolume",
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of each command in a page's bash blocks; comments and line ends taken away."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found += [shlex.split(part, comments=True) for part in line.split("&&")]
    return [words for words in found if words]


def github_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings by GitHub's rule."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).replace(" ", "-")
        for title in titles
    }


def site_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings on the site."""
    return {slugify(title.replace("`", ""), "-") for title in re.findall(r"^#+ (.+)$", prose(page), re.M)}


@pytest.mark.parametrize(
    ("page", "most"),
    [
        ("README.md", 150),
        ("docs/index.md", 60),
        ("recipes/README.md", 60),
        *((name_of(page), 150) for page in ROOT.glob("recipes/*/README.md")),
        *((name_of(page), 150) for page in ROOT.glob("results/**/README.md")),
        *((name_of(page), 250) for page in ROOT.glob("docs/*.md")),
    ],
)
def test_pages_are_short(page, most):
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_the_layout_names_every_module():
    layout = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("##")[0]
    modules = [path for path in (ROOT / "trl_drcd").iterdir() if not path.name.startswith(("_", ".", "py.typed"))]
    names = [path.stem if path.suffix == ".py" else f"{path.name}/" for path in modules]
    assert sorted(set(names) - set(re.findall(r"^([a-z_]+/?) ", layout, re.M))) == []


def test_the_index_names_every_page():
    index = (ROOT / "docs/index.md").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md") if page.name != "index.md"]
    assert [page for page in pages if f"]({page})" not in index] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_relative_links_and_anchors_resolve(page):
    """On the forge and on the site: to files, not folders, since a site has no folders."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{name_of(page)} links to {link}, which is not a file"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in github_anchors(target), f"{name_of(page)}: no heading {link}"
            assert anchor in site_anchors(target), f"{name_of(page)}: the site calls the heading {link} otherwise"


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_name_files_and_targets_that_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(page):
        for word in words:
            path = word.partition("=")[2] if word.startswith("--") else word
            if re.match(r"(?:\./)?(?:recipes|results|benchmarks|tests|docs|trl_drcd)/", path):
                assert (ROOT / path.partition("::")[0]).exists() or list(ROOT.glob(path)), (
                    f"{path} in {' '.join(words)}"
                )
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "trl-drcd" and words[1].islower():
            assert words[1] in trl_drcd.cli.COMMANDS, words


def known_flags(words: list[str]) -> set[str] | None:
    """Names of the arguments that a command takes; `None` if it is none of ours."""
    ours = [CFGDistillDiversityConfig, ModelConfig]
    if words[:2] == ["trl-drcd", "merge"]:
        kinds: list[type] = [trl_drcd.cli.MergeArguments]
    elif words[:2] == ["trl-drcd", "evaluate"]:
        kinds = [EvaluateArguments]
    elif words[:2] == ["trl-drcd", "push"]:
        kinds = [PushArguments]
    elif words[:3] == ["trl-drcd", "train", "music"] or "recipes/musiclm_drcd.py" in words:
        kinds = [MusicArguments, *ours]
    elif words[:3] == ["trl-drcd", "train", "text"] or "recipes/text_drcd.py" in words:
        kinds = [TextArguments, *ours]
    else:
        return None
    return {field.name for kind in kinds for field in fields(kind)} | {"config", "help", "help_all"}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_have_flags_that_exist(page):
    for words in commands(page):
        script = next((place for place, word in enumerate(words) if word.endswith("_drcd.py")), 0)
        if (known := known_flags(words)) is not None:
            flags = {
                word.strip("[").lstrip("-").partition("=")[0]
                for word in words[script:]
                if word.strip("[").startswith("--")
            }
            assert sorted(flag.strip("]") for flag in flags if flag.strip("]") not in known) == [], " ".join(words)


def test_paths_in_the_text_exist():
    """Files of the repository that the prose names in backticks."""
    pattern = r"`((?:recipes|results|benchmarks|tests|docs|trl_drcd)/[\w./*-]+)`"
    missing = [
        f"{name_of(page)}: {path}"
        for page in WRITTEN
        if page.name != "CHANGELOG.md"
        for path in re.findall(pattern, prose(page))
        if not (page.parent / path).exists() and not list(ROOT.glob(path))
    ]
    assert missing == []


def test_pages_named_in_code_exist():
    files = [*ROOT.glob("*/**/*.py"), *ROOT.glob("recipes/**/*.yaml"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    own = [file for file in files if file != Path(__file__) and ".venv" not in file.parts]
    pages = {
        (name_of(file), page)
        for file in own
        for page in re.findall(r"\b((?:recipes|docs|results|benchmarks)/[\w/]*\.md)\b", file.read_text())
    }
    assert [pair for pair in sorted(pages) if not (ROOT / pair[1]).is_file()] == []


def resolve(dotted: str) -> object:
    """What a dotted name stands for; `AttributeError` or `ImportError` if there is nothing."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not dotted.startswith(str(error.name)):
                raise
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "CHANGELOG.md"], ids=name_of)
def test_names_of_the_library_import(page):
    names = set(re.findall(r"\btrl_drcd(?:\.[A-Za-z_]\w*)+(?![\w/])", page.read_text()))
    modules = "|".join(path.stem for path in (ROOT / "trl_drcd").iterdir() if not path.name.startswith("_"))
    names |= {f"trl_drcd.{name}" for name in re.findall(rf"`((?:{modules})\.\w+)", prose(page))}
    for name in sorted(names - {"trl_drcd.md"}):
        if not re.search(r"\.(?:py|md|png|yaml|csv|jsonl?)$", name):
            resolve(name)


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_imports_of_python_examples_work(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trl_drcd"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_public_names_have_an_api_page():
    """A name stands in a module or package that a page of docs/api renders."""
    rendered = set(re.findall(r"^::: ([\w.]+)", "".join(p.read_text() for p in ROOT.glob("docs/api/*.md")), re.M))
    for name in PUBLIC_NAMES:
        value = resolve(name)
        assert {name.rpartition(".")[0], value.__module__} & rendered, name


INTERVAL = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)? \[-?\d[\d.,]*, -?\d[\d.,]*\]")


@pytest.mark.parametrize(
    "page",
    [page for page in WRITTEN if not name_of(page).startswith(("results", "benchmarks", "recipes/tiny_music"))],
    ids=name_of,
)
def test_intervals_stand_in_a_report(page):
    """A measured value outside results/ is one that a report there holds, to the digit."""
    reports = "".join(report.read_text() for report in ROOT.glob("results/**/*.md"))
    known = {interval.lstrip("+") for interval in INTERVAL.findall(reports)}
    assert [value for value in INTERVAL.findall(" ".join(prose(page).split())) if value.lstrip("+") not in known] == []


def test_every_metric_is_explained():
    page = (ROOT / "docs/evaluation.md").read_text()
    assert [metric.key for metric in METRICS if f"`{metric.key}`" not in page] == []


def documented_names(docstring: str) -> list[str]:
    """Names in the `Args:` of a docstring."""
    section = re.search(r"^ *Args:\n((?: +.*\n|\n)*?)(?=^ *\w+:\n|\Z)", docstring + "\n", re.M)
    if not section:
        return []
    indent = re.match(r" *", section[1])[0]
    heads = re.findall(rf"^{indent}(\*{{0,2}}\w+(?:, \w+)*)(?: \(.*)?:", section[1], re.M)
    return [name.strip("* ") for head in heads for name in head.split(",")]


def test_docstrings_document_arguments_that_exist():
    wrong = []
    for file in (ROOT / "trl_drcd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (docstring := ast.get_docstring(node, clean=True)):
                functions = (
                    [node]
                    if isinstance(node, ast.FunctionDef)
                    else [
                        item
                        for item in node.body
                        if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__", "forward")
                    ]
                )
                known = {
                    arg.arg
                    for f in functions
                    for arg in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg]
                    if arg
                }
                if isinstance(node, ast.ClassDef):
                    known |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
                wrong += [
                    f"{file.name}:{node.name}: {name}" for name in documented_names(docstring) if name not in known
                ]
    assert wrong == []


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?://[^\"' >]+)", text)
        loaded += re.findall(
            r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?(https?://[^\"' >]+)", text
        )
        assert loaded == [], page.name
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    for name in PUBLIC_NAMES:
        value = resolve(name)
        assert {name, f"{value.__module__}.{value.__qualname__}"} & names, name
