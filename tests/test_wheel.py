"""The wheel, in a folder of its own and far from the repository: what it holds, and that its commands work."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import WORDS

import trl_drcd

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel, made of the sdist, made of a copy of the repository without what git ignores."""
    folder = tmp_path_factory.mktemp("built")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, files):
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    build = f"from hatchling import build; print(build.build_sdist({str(folder)!r}))"
    assert run(sys.executable, "-c", build, cwd=folder / "copy").returncode == 0
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (folder / "sdist").iterdir()
    build = f"from hatchling import build; print(build.build_wheel({str(folder)!r}))"
    made = run(sys.executable, "-c", build, cwd=source)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """The wheel alone, installed into a folder; what it depends on comes from this environment."""
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", built / "site", wheel]
    made = run(*pip, cwd=built)
    assert made.returncode == 0, made.stderr
    return built / "site"


@pytest.fixture
def command(installed, tmp_path):
    """`trl-drcd ...` of the installed wheel, in an empty folder."""

    def command(*words: object) -> subprocess.CompletedProcess[str]:
        code = "import sys; from trl_drcd.cli import main; main(sys.argv[1:])"
        return run(sys.executable, "-c", code, *words, cwd=tmp_path, PYTHONPATH=str(installed))

    return command


def test_it_holds_the_package_and_no_more(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = subprocess.run(["git", "ls-files", "trl_drcd"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    info = f"trl_drcd-{trl_drcd.__version__}.dist-info"
    others = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == set(files) | others
    assert {"trl_drcd/py.typed", "trl_drcd/scripts/train_text.py", "trl_drcd/templates/model_card.md.j2"} <= names
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) | {"pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE"} <= inside
    assert not [name for name in inside if name.startswith(("recipes", "tests", "results", "docs"))]


def test_its_page_on_an_index_has_links_that_work_there(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = message_from_bytes(archive.read(name))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) >= {"Repository", "Documentation", "Issues", "Changelog"}
    text = metadata.get_payload()
    assert text.startswith("# trl_drcd")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert len(links) > 10 and all(link.startswith("https://") for link in links)
    for link in links:
        if link.startswith(urls["Repository"]):
            path = re.sub(r"^/(blob|raw)/HEAD/|#.*$", "", link.removeprefix(urls["Repository"]))
            assert (ROOT / path).is_file(), link


def test_its_help_needs_nothing_of_the_repository(command):
    assert command("--version").stdout == f"trl-drcd {trl_drcd.__version__}\n"
    for words in (["--help"], ["train", "--help"], ["train", "text", "--help"], ["train", "music", "--help"],
                  ["merge", "--help"], ["evaluate", "--help"]):  # fmt: skip
        shown = command(*words)
        assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr
        assert "recipes/" not in shown.stdout


@pytest.mark.parametrize("name", ["music", "text"])
def test_training_without_a_model_says_what_to_give(command, name):
    ended = command("train", name)
    assert ended.returncode == 1 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        f"trl-drcd train {name}: error: `model_name_or_path` is missing; give a model with `--model_name_or_path` and "
        "prompts with `--dataset`, or both in a YAML file with `--config`"
    )


def test_it_trains_and_merges_and_evaluates(command, tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = (json.dumps({"prompt": f"slow {word}"}) + "\n" for word in WORDS)
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "ours.py").write_text(
        "import torch\n\n"
        "def embed(texts):\n    return torch.tensor([[len(t) + 1.0, t.count('a') + 1.0] for t in texts])\n"
    )
    settings = {
        "model_name_or_path": "model", "dataset": "prompts.jsonl", "max_steps": 1, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "max_completion_length": 4, "gradient_checkpointing": False, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "embedder": "ours.embed", "diversity_coef": 1.0,
        "diversity_warmup_steps": 0, "num_samples": 1,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    for output in ("a", "b"):
        ended = command("train", "text", "--config", "run.yaml", "--output_dir", output, "--seed", ord(output))
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / output / "model.safetensors").is_file() and (tmp_path / output / "README.md").is_file()
    ended = command("merge", "--quality", "a", "--diversity", "b", "--out", "merged")
    assert ended.returncode == 0 and "Merged: merged" in ended.stdout, ended.stderr
    (tmp_path / "front.yaml").write_text(
        "model: model\ndataset: prompts.jsonl\nstrategies:\n  - {name: base}\n  - {name: merged, model: merged}\n"
        "num_prompts: 2\nsamples_per_prompt: 2\nmax_new_tokens: 3\noutput_dir: front\n"
    )
    ended = command("evaluate", "--config", "front.yaml")
    assert ended.returncode == 0 and (tmp_path / "front" / "report.html").is_file(), ended.stderr
