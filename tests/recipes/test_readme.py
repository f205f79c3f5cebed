"""The Python examples of README and docs run as they stand, but for their length."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]


def python_example(page: str) -> str:
    """The first Python block of a page."""
    match = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert match, f"{page} has no Python example"
    return match[1]


@pytest.mark.slow
@pytest.mark.real
def test_the_twelve_lines_run(tmp_path, monkeypatch, smollm2):
    code = python_example("README.md")
    shorter = code.replace(
        "max_completion_length=40",
        "max_completion_length=4, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, "
        "report_to='none', save_strategy='no'",
    ).replace("outputs/mine", str(tmp_path))
    for folder in ("smollm2", "minilm"):
        shorter = shorter.replace(f"outputs/{folder}", str(smollm2 / folder))
    assert shorter.count("max_steps=1") == 1 and str(tmp_path) in shorter and "outputs/" not in shorter
    assert len([line for line in code.splitlines() if line]) <= 13
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(shorter, names)
    assert names["trainer"].state.global_step == 1
    assert {"adapter_model.safetensors", "generation_config.json", "README.md"} <= {f.name for f in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text()
    assert "guidance 3 is in the weights" in card and "model=None" not in card


def test_the_merging_example_runs(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("base")
    for name in ("quality", "diversity"):
        get_peft_model(LlamaForCausalLM.from_pretrained("base"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
            f"{name}_lora"
        )
    names = {"model": PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "quality_lora", "quality")}
    exec(python_example("docs/merging.md"), names)
    assert names["model"].active_adapters == ["quality", "diversity"]
    assert Path("merged_lora/adapter_model.safetensors").is_file()
