"""
Hide or repair a torchaudio that cannot be imported.

transformers imports torchaudio wherever it is installed, so a torchaudio that cannot be imported breaks every program
that uses transformers. The wheel of torchaudio 2.11.0, its newest release, holds compiled extensions linked against
CUDA 13.0. They fail in two cases:

- with a CPU-only torch, which has no CUDA libraries (`OSError: libcudart.so.13` or `libc10_cuda.so`);
- with a torch built for another CUDA version: 2.11 to 2.14 have 13.0 and work, 2.15 has 13.2 (`RuntimeError`).

`import trl_drcd` therefore makes such a torchaudio look as if it were not installed. transformers then works, and so
does this package except for its audio code, where `require` raises an error with the fix ([`torchaudio_problem`]).
This package uses only the pure-PyTorch transforms, and torchaudio can be imported when the extension files are absent.
In the first case the following command deletes them (`make install` runs it too); in the second, reinstall with `pip`:

    python -m trl_drcd.compat.torchaudio_wheel

This module imports neither torch nor torchaudio, so it is fast and works when they do not. It can be removed when
torchaudio has a release whose wheel works with every torch (tests/test_setup.py).
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
    spec = PathFinder.find_spec(name)  # `importlib.util.find_spec` would not find a hidden package
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _extension_files(torchaudio_dir: Path) -> list[Path]:
    return sorted([*torchaudio_dir.rglob("*.so"), *torchaudio_dir.rglob("*.pyd")])


def _version_file(package_dir: Path) -> dict[str, Any]:
    """Variables defined in a package's `version.py`; empty if there is no such file."""
    file = package_dir / "version.py"
    return runpy.run_path(str(file)) if file.is_file() else {}


def cuda_versions(torch_dir: Path, torchaudio_dir: Path) -> tuple[str | None, str | None]:
    """
    CUDA versions, such as `"13.0"`, that torch and torchaudio were built with.

    Args:
        torch_dir (`pathlib.Path`): Folder of the installed torch.
        torchaudio_dir (`pathlib.Path`): Folder of the installed torchaudio.

    Returns:
        `tuple[str | None, str | None]`: The versions of torch and torchaudio; `None` for a build without CUDA, and for
        a torchaudio without compiled extensions.
    """
    torch_cuda = _version_file(torch_dir).get("cuda")
    version = str(_version_file(torchaudio_dir).get("__version__"))
    tag = re.search(r"\+cu(\d+)(\d)$", version)  # "2.11.0+cu130": CUDA 13.0
    torchaudio_cuda = f"{tag[1]}.{tag[2]}" if tag and _extension_files(torchaudio_dir) else None
    return torch_cuda, torchaudio_cuda


def torchaudio_problem() -> str | None:
    """Why the installed torchaudio cannot be imported, with the fix; `None` if it can or is not installed."""
    torch_dir, torchaudio_dir = _package_dir("torch"), _package_dir("torchaudio")
    if torch_dir is None or torchaudio_dir is None:
        return None
    torch_cuda, torchaudio_cuda = cuda_versions(torch_dir, torchaudio_dir)
    if torchaudio_cuda is None or torchaudio_cuda == torch_cuda:
        return None
    if torch_cuda is None:
        return (
            f"the installed torch has no CUDA, but the installed torchaudio is linked against CUDA {torchaudio_cuda}, "
            "so it cannot be imported. Only its pure-PyTorch part is needed here; remove the rest with: "
            f"{COMMAND}"
        )
    return (
        f"the installed torch was built with CUDA {torch_cuda}, but the installed torchaudio with CUDA "
        f"{torchaudio_cuda}, so it cannot be imported. Install versions built with the same CUDA, such as the default "
        'wheels of: pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"'
    )


def hide_unusable_torchaudio() -> None:
    """
    Make a torchaudio that cannot be imported look as if it were not installed, also to transformers.

    Sets its entry in `sys.modules` to `None`: `find_spec` then finds nothing, and an import raises
    `ModuleNotFoundError`.
    """
    if "torchaudio" not in sys.modules and torchaudio_problem():
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


def remove_cuda_extensions() -> list[Path]:
    """
    Delete torchaudio's compiled extensions where torch is CPU-only and they are linked against CUDA.

    Returns:
        `list[pathlib.Path]`: The deleted files; empty if nothing had to be deleted.
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
