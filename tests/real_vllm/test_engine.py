"""
The real vLLM, on a CPU if need be: `make vllm` sets it up in an environment of its own and runs these tests.

SmolLM2 takes part where DRCD_SMOLLM2 names its folder (recipes/text/get_smollm2.py makes one).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_model, make_tokenizer
from trl_drcd.merging import interpolate_adapters, interpolate_checkpoints

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; `make vllm` installs and tests"),
]
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes/tiny_music/models/musiclm"
ADAPTERS = [str(ROOT / "results/music/runs" / name) for name in ("beta0_s0", "beta300_s0")]
SMOLLM2 = os.environ.get("DRCD_SMOLLM2")


def run(*arguments: str, **environment: str) -> dict:
    """The result of a call of `worker.py`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/real_vllm/worker.py"), *arguments], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def random_llama(folder: Path, **settings) -> str:
    """Large enough for vLLM, whose heads have 32 or more dimensions; its logits are spread."""
    tokenizer = make_tokenizer()
    model = make_model(
        tokenizer, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        initializer_range=0.3, **settings,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def base_of(name: str, tmp_path: Path) -> str:
    if name == "smollm2" and not SMOLLM2:
        pytest.skip("needs the folder of SmolLM2 in DRCD_SMOLLM2")
    own = {"shipped": str(SHIPPED), "smollm2": str(SMOLLM2)}
    return own[name] if name in own else random_llama(tmp_path / "base", tie_word_embeddings=name == "tied")


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", ["random", "tied", "shipped", "smollm2"])
def test_colocated_rollouts_are_scored_as_they_were_sampled(tmp_path, name, lora):
    """vLLM's log-probs of its samples are the student's after each update, so the weights arrive."""
    base = base_of(name, tmp_path)
    rate = {"shipped": "1e-3", "smollm2": "1e-4"}.get(name, "2e-2")
    options = ["--lora"] if lora else []
    found = run("colocate", base, str(tmp_path / "out"), *options, DRCD_VLLM_RATE=rate if not lora else "2e-2")
    print(name, options, found)
    assert max(found["student"]) < 2e-4, found
    assert found["base"][0] < 2e-4, "before the first update the student is the base"
    assert min(found["base"][1:]) > 50 * max(found["student"]), "an update that changes nothing shows nothing"


def test_the_seed_of_the_run_is_that_of_its_rollouts(tmp_path):
    """Two runs with one seed sample alike, and with another seed otherwise."""
    base = random_llama(tmp_path / "base")
    first, again, other = (run("first_rollout", base, str(tmp_path / n), n[0]) for n in ("1a", "1b", "2"))
    assert first == again and len(first) == len(other) > 1
    assert first != other


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_merged_checkpoint_is_served(tmp_path, weight):
    """Two whole models from the shipped runs, merged, give the same greedy tokens in vLLM as in transformers."""
    ends = []
    for number, adapter in enumerate(ADAPTERS):
        base = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / str(number))
        AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / str(number))
        ends.append(str(tmp_path / str(number)))
    interpolate_checkpoints(ends, [1 - weight, weight], tmp_path / "merged")
    found = run("serve_checkpoint", str(tmp_path / "merged"))
    assert found["vllm"] == found["transformers"] and len({tuple(row) for row in found["vllm"]}) > 1


def test_interpolated_adapters_are_served(tmp_path):
    """At lambda 0, 0.5 and 1, from one engine."""
    folders = []
    for weight in (0.0, 0.5, 1.0):
        folders.append(str(tmp_path / f"lambda_{weight}"))
        interpolate_adapters(ADAPTERS, [1 - weight, weight], folders[-1])
    found = run("serve_adapters", str(SHIPPED), *folders)
    assert found["vllm"] == found["transformers"]
    assert found["vllm"][0] != found["vllm"][2], "the two ends must differ"
