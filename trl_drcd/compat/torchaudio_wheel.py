"""
Keeps `import torchaudio`, and with it `import transformers`, working.

transformers imports torchaudio wherever it is installed, so a torchaudio that cannot be imported breaks every program
that uses transformers. The wheel of torchaudio 2.11.0, its newest release, holds compiled extensions linked against
CUDA 13.0. They fail in two cases:

- beside a CPU-only torch, which has no CUDA libraries (`OSError: libcudart.so.13` or `libc10_cuda.so`);
- beside a torch made with another CUDA: 2.11 to 2.14 have 13.0 and fit, 2.15 has 13.2 (`RuntimeError`).

Only the pure-PyTorch transforms are used here, and torchaudio imports without the extensions when they are absent. So
in the first case `python trl_drcd/compat/torchaudio_wheel.py` deletes them (`make install` runs it); the second is for
`pip` to mend, which is what `torch>=2.11,<2.15` is for. Nothing here imports torch or torchaudio: it is cheap, and it
works when they do not. The file is run by its path, as importing the package would raise the error it cures.
"""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def _package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it; `None` if it is not installed."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _extension_files(torchaudio_dir: Path) -> list[Path]:
    return sorted([*torchaudio_dir.rglob("*.so"), *torchaudio_dir.rglob("*.pyd")])


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
    torch_cuda = runpy.run_path(str(torch_dir / "version.py"))["cuda"]
    torchaudio_version = runpy.run_path(str(torchaudio_dir / "version.py"))["__version__"]
    tag = re.search(r"\+cu(\d+)(\d)$", torchaudio_version)  # "2.11.0+cu130": CUDA 13.0
    torchaudio_cuda = f"{tag[1]}.{tag[2]}" if tag and _extension_files(torchaudio_dir) else None
    return torch_cuda, torchaudio_cuda


def check_torchaudio() -> None:
    """
    Refuse a torchaudio that cannot be imported, with a message that says what to do.

    Does nothing where torchaudio is not installed.

    Raises:
        ImportError: If torchaudio's compiled extensions were made for a CUDA that torch does not have.
    """
    torch_dir, torchaudio_dir = _package_dir("torch"), _package_dir("torchaudio")
    if torch_dir is None or torchaudio_dir is None:
        return
    torch_cuda, torchaudio_cuda = cuda_versions(torch_dir, torchaudio_dir)
    if torchaudio_cuda is None or torchaudio_cuda == torch_cuda:
        return
    if torch_cuda is None:
        raise ImportError(
            f"The installed torch has no CUDA, but the installed torchaudio is linked against CUDA {torchaudio_cuda}: "
            "neither torchaudio nor transformers can be imported. trl-drcd needs only its pure-PyTorch part; this "
            f"removes the rest:\n    {sys.executable} {Path(__file__).resolve()}"
        )
    raise ImportError(
        f"The installed torch was made with CUDA {torch_cuda}, but the installed torchaudio with CUDA "
        f"{torchaudio_cuda}: neither torchaudio nor transformers can be imported. Install a pair made with the same "
        'CUDA, such as the default wheels of\n    pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"'
    )


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
    removed = remove_cuda_extensions()
    print(f"torchaudio: removed {len(removed)} compiled files that need CUDA" if removed else "torchaudio: fits torch")
