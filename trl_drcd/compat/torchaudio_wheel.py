"""
Hides a torchaudio that cannot be imported, and mends it.

transformers imports torchaudio wherever it is installed, so a torchaudio that cannot be imported breaks every program
that uses transformers. The wheel of torchaudio 2.11.0, its newest release, holds compiled extensions linked against
CUDA 13.0. They fail in two cases:

- beside a CPU-only torch, which has no CUDA libraries (`OSError: libcudart.so.13` or `libc10_cuda.so`);
- beside a torch made with another CUDA: 2.11 to 2.14 have 13.0 and fit, 2.15 has 13.2 (`RuntimeError`).

`import trl_drcd` therefore makes such a torchaudio look as if it were not installed: transformers then works, and so
does all of this package but what hears sound, where `require` says what to do ([`torchaudio_problem`]). Only the
pure-PyTorch transforms are used here, and torchaudio imports without the extensions when they are absent. So in the
first case this deletes them (`make install` does it too); the second is for `pip` to mend:

    python -m trl_drcd.compat.torchaudio_wheel

Nothing here imports torch or torchaudio: it is cheap, and it works when they do not. It can go when torchaudio has a
release whose wheel fits every torch (tests/test_setup.py).
"""

import re
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

COMMAND = f"{sys.executable} -m trl_drcd.compat.torchaudio_wheel"


def _package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it; `None` if it is not installed."""
    spec = PathFinder.find_spec(name)  # `importlib.util.find_spec` would not find what is hidden
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _extension_files(torchaudio_dir: Path) -> list[Path]:
    return sorted([*torchaudio_dir.rglob("*.so"), *torchaudio_dir.rglob("*.pyd")])


def _version_file(package_dir: Path) -> dict[str, Any]:
    """The names in a package's `version.py`; none if it has no such file."""
    file = package_dir / "version.py"
    return runpy.run_path(str(file)) if file.is_file() else {}


def cuda_versions(torch_dir: Path, torchaudio_dir: Path) -> tuple[str | None, str | None]:
    """
    CUDA versions, such as `"13.0"`, that torch and torchaudio were made with.

    Args:
        torch_dir (`pathlib.Path`): Folder of the installed torch.
        torchaudio_dir (`pathlib.Path`): Folder of the installed torchaudio.

    Returns:
        `tuple[str | None, str | None]`: Of torch and of torchaudio; `None` stands for one made without CUDA, and for a
        torchaudio without compiled extensions.
    """
    torch_cuda = _version_file(torch_dir).get("cuda")
    version = str(_version_file(torchaudio_dir).get("__version__"))
    tag = re.search(r"\+cu(\d+)(\d)$", version)  # "2.11.0+cu130": CUDA 13.0
    torchaudio_cuda = f"{tag[1]}.{tag[2]}" if tag and _extension_files(torchaudio_dir) else None
    return torch_cuda, torchaudio_cuda


def torchaudio_problem() -> str | None:
    """Why the installed torchaudio cannot be imported, and what to do; `None` if it can, or if there is none."""
    torch_dir, torchaudio_dir = _package_dir("torch"), _package_dir("torchaudio")
    if torch_dir is None or torchaudio_dir is None:
        return None
    torch_cuda, torchaudio_cuda = cuda_versions(torch_dir, torchaudio_dir)
    if torchaudio_cuda is None or torchaudio_cuda == torch_cuda:
        return None
    if torch_cuda is None:
        return (
            f"the installed torch has no CUDA, but the installed torchaudio is linked against CUDA {torchaudio_cuda}, "
            "so it cannot be imported. Only its pure-PyTorch part is needed here; this removes the rest: "
            f"{COMMAND}"
        )
    return (
        f"the installed torch was made with CUDA {torch_cuda}, but the installed torchaudio with CUDA "
        f"{torchaudio_cuda}, so it cannot be imported. Install a pair made with the same CUDA, such as the default "
        'wheels of: pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"'
    )


def hide_unusable_torchaudio() -> None:
    """
    Make a torchaudio that cannot be imported look as if it were not installed, to transformers too.

    `None` in `sys.modules` is Python's own way to say so: `find_spec` finds nothing, and an import is a
    `ModuleNotFoundError`.
    """
    if "torchaudio" not in sys.modules and torchaudio_problem():
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


def remove_cuda_extensions() -> list[Path]:
    """
    Delete torchaudio's compiled extensions where torch is CPU-only and they are linked against CUDA.

    Returns:
        `list[pathlib.Path]`: The deleted files; empty where nothing had to be done.
    """
    torch_dir, torchaudio_dir = _package_dir("torch"), _package_dir("torchaudio")
    if torch_dir is None or torchaudio_dir is None:
        return []
    torch_cuda, torchaudio_cuda = cuda_versions(torch_dir, torchaudio_dir)
    if torch_cuda is not None or torchaudio_cuda is None:
        return []
    files = _extension_files(torchaudio_dir)
    for file in files:
        file.unlink()
    return files


if __name__ == "__main__":
    if removed := remove_cuda_extensions():
        print(f"torchaudio: removed {len(removed)} compiled files that need CUDA")
    elif problem := torchaudio_problem():
        raise SystemExit(f"torchaudio: {problem}")
    else:
        print("torchaudio: fits torch")
