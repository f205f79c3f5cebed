"""What a pushed card says: metrics with intervals, the front, lambda, samples to hear, and examples that run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import make_model
from tests.hub.server import TOKEN
from tests.test_musicgen import make_musicgen, make_t5_tokenizer
from tests.test_musicgen import make_trainer as make_musicgen_trainer
from tests.test_trainer import make_trainer
from trl_drcd.evaluation.digests import weights_digest
from trl_drcd.evaluation.results import Result, read_results
from trl_drcd.files import wav_bytes
from trl_drcd.hub import push_to_hub
from trl_drcd.merging import interpolate_adapters, interpolate_checkpoints

SHIPPED = Path(__file__).parents[2] / "recipes/tiny_music/models"
METRICS = {
    "quality": {"mean": 0.5, "low": 0.41, "high": 0.59},
    "diversity": {"mean": 0.3, "low": 0.25, "high": 0.35},
}


def card_of(hub, name):
    return ModelCard(hub.repos[name].files["README.md"].decode())


@pytest.fixture
def results(tmp_path):
    """An evaluation of the model `quality` and of its base."""
    folder = tmp_path / "front"
    folder.mkdir()
    (folder / "front.png").write_bytes(b"\x89PNG front")
    about = {"prompts": 64, "samples_per_prompt": 8, "kind": "text"}
    other = {name: {key: value + 1 for key, value in values.items()} for name, values in METRICS.items()}
    rows = [
        Result(strategy="base", point="base", name="base", model="base", metrics=other, **about),
        Result(strategy="q", point="q", name="q", model="quality", weights=(1.0,), metrics=METRICS, **about),
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return folder


def test_metrics_with_intervals_and_the_front(hub, folder, results):
    command = "trl-drcd train text --max_steps 2"
    push_to_hub(folder, "user/quality", results=results, datasets=["user/prompts"], command=command)
    card, files = card_of(hub, "user/quality"), hub.repos["user/quality"].files
    found = {result.metric_type: result for result in card.data.eval_results}
    assert set(found) == set(METRICS) and card.data.model_name == "user/quality"
    for name, values in METRICS.items():
        assert found[name].metric_value == values["mean"]
        assert found[name].metric_args == {"low": values["low"], "high": values["high"], "interval": 0.95}
        assert f"interval {values['low']:.4g} to {values['high']:.4g}" in found[name].metric_name
    assert found["quality"].dataset_name == "64 held-out prompts, 8 samples each"
    assert "| quality | 0.5 | 0.41 | 0.59 |" in card.text
    assert files["front.png"] == b"\x89PNG front" and "](front.png)" in card.text
    header = card.data.to_dict()
    assert header["datasets"] == ["user/prompts"] and header["base_model_relation"] == "finetune"
    assert header["license"] == "apache-2.0" and header["base_model"] == "user/base"
    assert command in card.text and "2410.06084" in card.text and "Pushed by [trl-drcd]" in card.text


@pytest.mark.parametrize("name", ["nothing", "base"])
def test_the_line_of_results_is_named(hub, folder, results, name):
    if name == "base":
        push_to_hub(folder, "user/quality", results=results, strategy="base")
        assert {one.metric_value for one in card_of(hub, "user/quality").data.eval_results} == {1.5, 1.3}
        return
    with pytest.raises(ValueError, match="has 0 rows for nothing, expected 1; set `strategy` to one of: base, q"):
        push_to_hub(folder, "user/quality", results=results, strategy=name)


def test_metrics_of_other_weights_are_refused(hub, folder, results):
    """The folder was trained again after the evaluation."""
    rows = read_results(results / "results.jsonl")

    def measured(digest):
        lines = [replace(row, model_digest=digest) if row.name == "q" else row for row in rows]
        (results / "results.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in lines))

    measured(weights_digest(folder))
    (folder / "LICENSE").write_text("Apache")
    push_to_hub(folder, "user/quality", results=results)
    measured("0123456789ab")
    with pytest.raises(ValueError, match=r"q was measured on other weights than .* run the evaluation again"):
        push_to_hub(folder, "user/quality", results=results)


def test_a_merge_says_its_lambda(hub, folder, tmp_path):
    interpolate_checkpoints([folder, folder], [0.6, 0.4], tmp_path / "merged")
    push_to_hub(tmp_path / "merged", "user/merged", base_model=["user/quality", "user/diversity"])
    card = card_of(hub, "user/merged")
    header = card.data.to_dict()
    assert header["interpolation_weight"] == 0.4 and header["base_model_relation"] == "merge"
    assert header["base_model"] == ["user/quality", "user/diversity"]
    assert "Interpolated at lambda = 0.4" in card.text
    assert "trl-drcd merge --models user/quality user/diversity --weights 0.6 0.4" in card.text
    assert {"merge.yaml", "lerp.yaml"} & set(hub.repos["user/merged"].files)


def test_the_command_makes_the_merge_again(hub, folder, tmp_path):
    interpolate_checkpoints([folder, folder], [0.6, 0.4], tmp_path / "merged", dtype="bfloat16")
    push_to_hub(tmp_path / "merged", "user/merged", base_model=["user/quality", "user/diversity"])
    assert "--weights 0.6 0.4 --out merged --dtype bfloat16" in card_of(hub, "user/merged").text
    record = {"models": ["my run", "base"], "weights": [0.5, 0.5], "base_model": "tiny"}
    (tmp_path / "merged" / "merge.yaml").write_text(json.dumps(record))
    push_to_hub(tmp_path / "merged", "user/into", base_model=["user/base"])
    command = "trl-drcd merge --models 'my run' base --weights 0.5 0.5 --out into --base_model tiny"
    assert command in card_of(hub, "user/into").text


def test_a_licence_that_is_given_goes_without_the_name_of_another(hub, folder):
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("license: apache-2.0", "license: other\nlicense_name: llama3"))
    push_to_hub(folder, "user/a", license="mit")
    push_to_hub(folder, "user/b")
    headers = [card_of(hub, name).data.to_dict() for name in ("user/a", "user/b")]
    assert [header.get("license_name") for header in headers] == [None, "llama3"]


def test_samples_are_heard_on_the_page(hub, folder):
    sound = wav_bytes(torch.linspace(-1, 1, 800), 8000)
    (folder / "samples" / "0 #1.wav").write_bytes(sound)
    (folder / "samples" / "samples.jsonl").write_text('{"prompt": "slow | tune", "file": "0 #1.wav"}\n')
    push_to_hub(folder, "user/quality")
    card = card_of(hub, "user/quality")
    assert card.data.to_dict()["widget"] == [{"text": "slow | tune", "output": {"url": "samples/0%20%231.wav"}}]
    url = "https://huggingface.co/user/quality/resolve/main/samples/0%20%231.wav"
    assert f'<audio controls src="{url}"></audio>' in card.text and "slow \\| tune" in card.text
    assert hub.repos["user/quality"].files["samples/0 #1.wav"] == sound


@pytest.mark.parametrize("name", ["embedder", "judge", "codec", "preference", "descriptors"])
def test_embedders_judges_and_codecs(hub, name):
    push_to_hub(SHIPPED / name, f"user/{name}")
    files = hub.repos[f"user/{name}"].files
    weights = "codec.safetensors" if name == "codec" else "model.safetensors"
    assert files[weights] == (SHIPPED / name / weights).read_bytes()
    assert not [file for file in files if file.endswith((".bin", ".jsonl"))]
    assert card_of(hub, f"user/{name}").data.to_dict()["library_name"] == "trl-drcd"


# ---------------------------------------------------------------- examples that run

RUN = """
import json, sys, traceback
import torch
waveform, other = torch.sin(torch.arange(64000) / 20), torch.sin(torch.arange(128000) / 9)
failed = {}
for name, code in json.loads(open(sys.argv[1]).read()).items():
    try:
        exec(compile(code, name, "exec"), {"waveform": waveform, "other": other})
    except Exception:
        failed[name] = traceback.format_exc()
print("FAILED", json.dumps(failed))
"""


def test_every_example_runs_as_the_card_on_the_hub_has_it(hub, tmp_path, tokenizer):
    """Of a model, an adapter, merges of both, a MusicGen, an embedder and a codec; fetched by name."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n\n# base\n")
    push_to_hub(tmp_path / "base", "user/base")
    for name, lora in {"quality": False, "lora": True}.items():
        adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0) if lora else None
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trainer = make_trainer(tmp_path / name, tokenizer, model, max_steps=1, peft_config=adapter)
        trainer.train()
        trainer.save_model()
        push_to_hub(tmp_path / name, f"user/{name}", base_model=["user/base"])
    interpolate_checkpoints([tmp_path / "quality"] * 2, [0.5, 0.5], tmp_path / "merged")
    push_to_hub(tmp_path / "merged", "user/merged", base_model=["user/quality", "user/quality"])
    interpolate_adapters([tmp_path / "lora"] * 2, [0.5, 0.5], tmp_path / "merged_lora")
    push_to_hub(tmp_path / "merged_lora", "user/merged_lora", base_model=["user/base"])
    trainer = make_musicgen_trainer(tmp_path / "musicgen", make_t5_tokenizer(), make_musicgen(), max_steps=1)
    trainer.train()
    trainer.save_model()
    push_to_hub(tmp_path / "musicgen", "user/musicgen", base_model=["user/base"])
    for name in ("embedder", "codec"):
        push_to_hub(SHIPPED / name, f"user/{name}")
    names = ("quality", "lora", "merged", "merged_lora", "musicgen", "embedder", "codec")
    code = {name: re.findall(r"```python\n(.*?)```", card_of(hub, f"user/{name}").text, re.S)[0] for name in names}
    assert all(f'"user/{name}"' in text for name, text in code.items())
    (tmp_path / "examples.json").write_text(json.dumps(code))
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    call = subprocess.run(
        [sys.executable, "run.py", "examples.json"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert call.returncode == 0, call.stderr[-3000:]
    failed = json.loads(call.stdout.rpartition("FAILED ")[2])
    assert failed == {}, "\n".join(f"{name}:\n{code[name]}\n{text}" for name, text in failed.items())
    assert (tmp_path / "sound.wav").stat().st_size > 44  # of the MusicGen
