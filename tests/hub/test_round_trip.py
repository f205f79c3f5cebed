"""Train, push, load by name: every way in which a pushed model is used gives the tokens of the folder it came from."""

import json
import os
import subprocess
import sys
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.conftest import make_model
from tests.hub.server import TOKEN
from tests.test_trainer import make_trainer
from trl_drcd.hub import push_to_hub

SCRIPT = Path(__file__).with_name("load_and_sample.py")


def trained(folder, base, tokenizer, seed, lora=False):
    """One update of the base, or of an adapter on it, saved as `trl-drcd train` does."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0) if lora else None
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = make_trainer(
        folder, tokenizer, model, max_steps=2, learning_rate=3e-2, peft_config=adapter, diversity_coef=1.0, seed=seed
    )
    trainer.train()
    trainer.save_model()


def test_pushed_models_give_the_same_tokens_by_name(hub, tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n\n# base\n")
    for seed, name in enumerate(("quality", "diversity", "lora", "lora2")):
        trained(tmp_path / name, tmp_path / "base", tokenizer, seed, name.startswith("lora"))
    push_to_hub(tmp_path / "base", "user/base")
    for name in ("quality", "diversity", "lora", "lora2"):
        push_to_hub(tmp_path / name, f"user/{name}", base_model=["user/base"])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a slow tune"}\n{"prompt": "harp"}\n')
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    call = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert call.returncode == 0, call.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["hub"].keys() == found["here"].keys()
    assert {key for key, value in found["hub"].items() if value != found["here"][key]} == set(), found
    tokens = found["hub"]
    assert tokens["quality"] != tokens["base"] != tokens["load_adapter_model"]  # else equal ones would say nothing
    assert tokens["quality_0.4"] != tokens["quality_0.0"] and tokens["lora_0.4"] != tokens["lora_0.0"]
    assert set(tokens["metrics"]) == {"base", "CFG (gamma 3)", "quality", "adapter", "LERP (lambda 0.5)"}
    assert tokens["metrics"]["quality"] != tokens["metrics"]["base"] != tokens["metrics"]["adapter"]
    fetched = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    for name in ("base", "quality", "diversity", "lora", "lora2"):
        assert any(path.startswith(f"/user/{name}/resolve/") for path in fetched), name
    assert TOKEN not in call.stdout + call.stderr
