"""The package as it is installed: public names, extras, pins, and the torchaudio that breaks transformers."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trl_drcd
from trl_drcd.compat import torchaudio_wheel
from trl_drcd.compat.extras import require

ROOT = Path(__file__).parents[1]
MEND = ["-m", "trl_drcd.compat.torchaudio_wheel"]
HIDDEN = """
import trl_drcd, sys, importlib.util
print(importlib.util.find_spec("torchaudio"), sys.modules["torchaudio"] is None)
"""
REQUIRE = "from trl_drcd.compat.extras import require; require('torchaudio.transforms', 'audio')"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with `path` and this repository before the installed packages."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def make_pair(folder: Path, torch_cuda: str | None, torchaudio_version: str, compiled: bool = True) -> Path:
    """Packages torch and torchaudio that hold no more than what tells whether they fit."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    (folder / "torch" / "version.py").write_text(f"cuda = {torch_cuda!r}\n")
    (folder / "torchaudio" / "lib").mkdir(parents=True)
    (folder / "torchaudio" / "__init__.py").write_text("raise AssertionError('torchaudio was imported')")
    (folder / "torchaudio" / "version.py").write_text(f"__version__ = {torchaudio_version!r}\n")
    if compiled:
        (folder / "torchaudio" / "lib" / "libtorchaudio.abi3.so").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("torch_cuda", "torchaudio_version", "compiled"),
    [
        ("13.0", "2.11.0+cu130", True),  # the default wheels of torch 2.11 to 2.14
        (None, "2.11.0+cpu", True),  # both from a CPU index
        (None, "2.11.0+cu130", False),  # compiled files removed
        ("13.2", "2.11.0+cu130", False),
        (None, "2.11.0", True),  # macOS
    ],
)
def test_fitting_torchaudio_is_accepted_and_left_alone(tmp_path, torch_cuda, torchaudio_version, compiled):
    make_pair(tmp_path, torch_cuda, torchaudio_version, compiled)
    assert run_python("-c", "import trl_drcd", path=tmp_path).returncode == 0
    assert run_python(*MEND, path=tmp_path).returncode == 0
    assert len(list(tmp_path.rglob("*.so"))) == compiled


def test_cuda_torchaudio_beside_cpu_torch_is_hidden_until_the_named_command_has_run(tmp_path):
    make_pair(tmp_path, None, "2.11.0+cu130")
    assert run_python("-c", HIDDEN, path=tmp_path).stdout == "None True\n"  # transformers would look so
    before = run_python("-c", REQUIRE, path=tmp_path)
    assert "ImportError: torchaudio is needed here, and the installed torch has no CUDA" in before.stderr
    command = before.stderr.strip().rpartition("remove the rest with: ")[2].split()
    assert command == [sys.executable, *MEND]
    assert run_python(*command[1:], path=tmp_path).stdout == "torchaudio: removed 1 compiled files that need CUDA\n"
    assert run_python(*command[1:], path=tmp_path).stdout == "torchaudio: fits torch\n"
    assert "torchaudio was imported" in run_python("-c", REQUIRE, path=tmp_path).stderr  # the stand-in's own words


def test_torchaudio_of_another_cuda_is_hidden_and_not_touched(tmp_path):
    make_pair(tmp_path, "13.2", "2.11.0+cu130")
    assert run_python("-c", HIDDEN, path=tmp_path).stdout == "None True\n"
    for result in (run_python("-c", REQUIRE, path=tmp_path), run_python(*MEND, path=tmp_path)):
        assert result.returncode == 1
        assert "torch was built with CUDA 13.2, but the installed torchaudio with CUDA 13.0" in result.stderr
        assert '"torch>=2.11,<2.15"' in result.stderr
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_missing_torchaudio_is_accepted(monkeypatch):
    monkeypatch.setattr("trl_drcd.compat.torchaudio_wheel._package_dir", lambda name: None)
    assert torchaudio_wheel.torchaudio_problem() is None
    assert torchaudio_wheel.remove_cuda_extensions() == []


def test_the_remedy_named_for_another_cuda_is_what_the_package_requires():
    specifiers = {Requirement(text).name: str(Requirement(text).specifier) for text in PROJECT["dependencies"]}
    assert specifiers["torch"] == str(Requirement("torch>=2.11,<2.15").specifier)
    assert "torchaudio>=2.11,<2.12" in PROJECT["optional-dependencies"]["audio"]


def test_installed_torchaudio_works_without_its_extensions():
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchaudio").transforms
    waveform = torch.sin(torch.arange(8000) * 0.1)
    assert transforms.MelSpectrogram(16000, n_mels=32)(waveform).shape == (32, 41)
    assert transforms.Resample(16000, 8000)(waveform).shape == (4000,)
    stretched = transforms.TimeStretch(n_freq=201, fixed_rate=2.0)(transforms.Spectrogram(power=None)(waveform))
    assert stretched.shape == (201, 21)
    assert torch.isfinite(transforms.GriffinLim(n_iter=2)(stretched.abs() ** 2)).all()


def test_import_brings_in_neither_torch_nor_transformers(tmp_path):
    code = "import sys, trl_drcd; print([m for m in ('torch', 'transformers', 'torchaudio') if m in sys.modules])"
    assert run_python("-c", code, path=tmp_path).stdout == "[]\n"


@pytest.mark.parametrize("name", trl_drcd.__all__)
def test_public_names_are_found_in_their_modules(name):
    value = getattr(trl_drcd, name)
    assert value.__name__ == name
    assert value.__module__.startswith("trl_drcd.")
    assert name in dir(trl_drcd)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = trl_drcd.Trainer


def test_version_is_the_distributions():
    assert version("trl-drcd") == trl_drcd.__version__


def test_require_returns_the_submodule():
    assert require("xml.dom", "audio") is sys.modules["xml.dom"]


def test_require_names_the_extra():
    with pytest.raises(ImportError, match=r'no_such_package is needed here.*pip install "trl-drcd\[audio\]"'):
        require("no_such_package.transforms", "audio")


def test_require_does_not_hide_what_an_installed_package_lacks(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("half_installed", "audio")


def test_every_required_module_comes_with_the_extra_that_is_named():
    extras = PROJECT["optional-dependencies"]
    for file in (ROOT / "trl_drcd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                module, extra = (argument.value for argument in node.args)
                package = canonicalize_name(module.partition(".")[0])
                assert extra in extras, f"{file.name}:{node.lineno} names the unknown extra {extra!r}"
                names = [canonicalize_name(Requirement(text).name) for text in extras[extra]]
                assert package in names, f"{file.name}:{node.lineno}: {extra!r} does not install {package}"


def test_constraints_pin_every_direct_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): pin for name, pin in pins.items()}
    assert all("+" not in pin for pin in pins.values()), "a local version such as +cpu fits one kind of machine only"
    for text in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(text)
        if requirement.name != "trl-drcd":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text
