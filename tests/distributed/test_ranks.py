"""
One training on 1, 2 and 4 processes, under every config of recipes/accelerate, gives one result.

The processes are CPUs that talk through gloo. Sampling is pinned: a completion depends on its row of the global batch
alone. See `scenarios.py` for what is trained, `worker.py` for what is recorded.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import worker
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from scenarios import GLOBAL_BATCH, GROUP, PROMPTS, SCENARIOS, pinned_completion
from transformers import AutoModelForCausalLM

from trl_drcd.validation.launch import check_sharding

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
# Beside float64: what DeepSpeed keeps in float32 whatever the model is, the weights that the optimiser works on
TOLERANCE = {"ddp": 1e-6, "fsdp2": 1e-6, "deepspeed_zero2": 1e-4, "deepspeed_zero3": 1e-4}


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The folder of what one process, this one, makes of a scenario; each is run once."""
    folder, done = tmp_path_factory.mktemp("alone"), set()

    def results(name):
        if name not in done:
            worker.run(name, folder)
            done.add(name)
        return folder

    return results


def launch(config: str, processes: int, arguments: list, options: tuple = ()) -> None:
    """Runs the worker as a user launches a recipe."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes)]
    command += ["--main_process_port", "0", *options, str(Path(worker.__file__)), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"DS_ACCELERATOR": "cpu"} if config.startswith("deepspeed") else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]


# Of an evaluation whose last batch is filled up with the first rows again; TRL's own metrics count these twice
EVALUATED = ("loss", "loss/distillation", "loss/diversity", "kl", "kl_per_token", "entropy", "diversity")
SECONDS = ("time/", "step_time", "_runtime", "_per_second")


def metrics(entry: dict[str, float]) -> dict[str, float]:
    """What of an entry of the log must not depend on the number of processes."""
    if any(key.startswith("eval_") for key in entry):
        return {f"eval_{key}": entry[f"eval_{key}"] for key in EVALUATED}
    return {key: value for key, value in entry.items() if not any(part in key for part in SECONDS)}


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two entries, absolute below 1, relative above."""
    assert ours.shape == expected.shape
    return float(((ours - expected).abs() / expected.abs().clamp(min=1)).max())


def check_equal(name: str, config: str, ours: Path, reference: Path) -> None:
    """Tensors and log of a scenario are those of the run on one process."""
    got, expected = load_file(ours / f"{name}.safetensors"), load_file(reference / f"{name}.safetensors")
    assert set(got) == set(expected)
    # TRL computes the log-probabilities before an update, which several updates per rollout need, in float32
    tolerance = 1e-5 if "num_iterations" in SCENARIOS[name].overrides else TOLERANCE[config]
    # Rows of the last batch of an evaluation beyond those of one process are the first ones again
    differences = {key: difference(got[key][: len(tensor)], tensor) for key, tensor in expected.items()}
    worst = max(differences, key=lambda key: differences[key])
    print(f"{config} {name}: at most {differences[worst]:.1e}, {worst}")
    assert differences[worst] < tolerance, f"{worst} of {name} is off by {differences[worst]:.1e}"
    logs, reference_logs = (json.loads((folder / f"{name}.json").read_text()) for folder in (ours, reference))
    for entries in zip(*logs, strict=True):
        assert all(metrics(entry) == metrics(entries[0]) for entry in entries), "a metric is of one process alone"
    # How many rows of a forward share a prompt depends on the processes, and a Llama's norms round to float32
    tolerance = max(tolerance, 2e-6)
    for entry, reference_entry in zip(logs[0], reference_logs[0], strict=True):
        entry, reference_entry = metrics(entry), metrics(reference_entry)
        if config != "ddp":  # gradients in pieces are not measured term by term
            of_terms = ("grad_norm/", "snr/")
            reference_entry = {key: value for key, value in reference_entry.items() if not key.startswith(of_terms)}
        assert entry == pytest.approx(reference_entry, rel=tolerance, abs=tolerance), name


def check_near(name: str, ours: Path, reference: Path) -> None:
    """The first loss is that of one process as far as bfloat16 goes, and weights move."""
    got, expected = load_file(ours / f"{name}.safetensors"), load_file(reference / f"{name}.safetensors")
    torch.testing.assert_close(got["train1/loss"], expected["train1/loss"], rtol=0.01, atol=0)
    assert got["train1/loss"].item() != got["train1/loss"].bfloat16().item(), "the loss itself was rounded"
    assert all(tensor.isfinite().all() for tensor in got.values())


def check_saved(folder: Path) -> None:
    """What the processes saved together is what they trained."""
    trained = load_file(folder / "full.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(folder / "full_saved", dtype="auto").state_dict()
    for key, tensor in saved.items():
        torch.testing.assert_close(trained[f"weights/{key}"], tensor.double())
    trained = load_file(folder / "lora.safetensors")
    saved = load_file(folder / "lora_saved" / "adapter_model.safetensors")
    assert saved
    for key, tensor in saved.items():
        name = "weights/" + key.replace(".weight", ".default.weight")
        torch.testing.assert_close(trained[name], tensor.double())


def test_groups_lie_on_two_processes_and_one_has_nothing_but_empty_completions():
    assert GLOBAL_BATCH // 2 % GROUP and GLOBAL_BATCH // 4 % GROUP
    last = range(GLOBAL_BATCH * 3 // 4, GLOBAL_BATCH)
    assert all(pinned_completion("train", 2, row, 13) == [] for row in last)
    assert len({len(pinned_completion("train", 1, row, 13)) for row in range(GLOBAL_BATCH)}) > 4


def test_two_processes_train_as_one_does(alone, tmp_path):
    names = [
        "full",
        "lora",
        "critic",
        "critic_hidden",
        "accumulate",
        "apart",
        "apart_lora",
        "masked",
        "allowed",
        "musicgen_lora",
        "dia",
    ]
    launch("ddp", 2, [tmp_path, *names])
    for name in names:
        check_equal(name, "ddp", tmp_path, alone(name))
    check_saved(tmp_path)


def test_two_processes_that_share_the_weights_train_as_one_does(alone, tmp_path):
    names = ["full", "lora", "allowed", "loaded"]
    launch("fsdp2", 2, [tmp_path, *names, "sampled", "bf16"], ("--fsdp_cpu_ram_efficient_loading", "true"))
    for name in names:
        check_equal(name, "fsdp2", tmp_path, alone(name))
    check_saved(tmp_path)
    log = json.loads((tmp_path / "sampled.json").read_text())[0]
    assert any(entry.get("completions/min_length", 8) < entry.get("completions/max_length", 0) for entry in log)
    check_near("bf16", tmp_path, alone("bf16"))


def scenarios_of(config: str) -> list[str]:
    """Those with pinned samples in float64 that go with a config; see `check_clipping` for what does not."""
    names = [name for name, scenario in SCENARIOS.items() if scenario.pinned and scenario.double]
    return [name for name in names if config == "ddp" or "max_grad_norm_diversity" not in SCENARIOS[name].overrides]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("processes", [2, 4])
def test_every_scenario(config, processes, alone, tmp_path):
    names = scenarios_of(config)
    launch(config, processes, [tmp_path, *names, "sampled", "musicgen_sampled", "bf16"])
    for name in names:
        check_equal(name, config, tmp_path, alone(name))
    check_near("bf16", tmp_path, alone("bf16"))
    check_saved(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3"])
def test_every_scenario_of_deepspeed(config, processes, alone, tmp_path):
    names = scenarios_of(config)
    sampled = ["sampled", "bf16", "musicgen_sampled"]
    if config == "deepspeed_zero3":  # what it does not go with: see `check_sharding`
        names = [name for name in names if name != "reused" and SCENARIOS[name].family not in ("musicgen", "dia")]
        sampled.remove("musicgen_sampled")
    launch(config, processes, [tmp_path, *names, *sampled])
    for name in names:
        check_equal(name, config, tmp_path, alone(name))
    check_near("bf16", tmp_path, alone("bf16"))
    check_saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "lora"),
    [("ddp", True), ("fsdp2", False), ("fsdp2", True), ("deepspeed_zero2", False), ("deepspeed_zero3", False)],
)
def test_a_recipe_trains_evaluates_saves_and_resumes(config, lora, model, tokenizer, tmp_path):
    """The text recipe on two processes: its samples and its model card are written, its model loads."""
    if config.startswith("deepspeed") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (pip install deepspeed)")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    settings = {
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "out",
        "dataset": tmp_path / "prompts.jsonl", "eval_dataset": tmp_path / "prompts.jsonl",
        "max_steps": 2, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1, "max_completion_length": 4,
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 1, "sample_steps": 1, "num_samples": 2,
        "logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": config == "ddp", "use_peft": lora,
        "lora_target_modules": "all-linear",
    }  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    launch(config, 2, ["text_drcd", *arguments])
    launch(config, 2, ["text_drcd", *arguments, "--max_steps", 3, "--resume_from_checkpoint", "true"])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "kl" in entry] == [1, 2, 3]
    assert len((tmp_path / "out" / "samples" / "samples.jsonl").read_text().splitlines()) == 2
    kind = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    trained = kind.from_pretrained(tmp_path / "out").state_dict()
    assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in trained.items()) == lora
    assert all(tensor.isfinite().all() for tensor in trained.values())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_for_eight_gpus(path):
    assert path.stem in TOLERANCE, "a config that no test launches"
    config = yaml.safe_load(path.read_text())
    assert config["num_processes"] == 8 and config["num_machines"] == 1


def test_sharding_that_gives_no_right_result_is_refused():
    def launched(**plugins):
        return SimpleNamespace(state=SimpleNamespace(**({"deepspeed_plugin": None} | plugins)))

    fsdp2 = launched(fsdp_plugin=SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True))
    check_sharding(fsdp2, True)
    with pytest.raises(ValueError, match="`fsdp_cpu_ram_efficient_loading=true` does not load the unsharded modules"):
        check_sharding(fsdp2, False, keeps_parts_whole=True)
    with pytest.raises(ValueError, match="`fsdp_version=1` is not supported; set `fsdp_version: 2`"):
        check_sharding(launched(fsdp_plugin=SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)), False)
    zero3 = launched(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    check_sharding(zero3, False)
    with pytest.raises(ValueError, match="several updates per rollout do not work with DeepSpeed ZeRO-3; set"):
        check_sharding(zero3, True)
    with pytest.raises(ValueError, match="`zero_stage=3` of DeepSpeed does not work with MusicGen and Dia; use"):
        check_sharding(zero3, False, keeps_parts_whole=True)
