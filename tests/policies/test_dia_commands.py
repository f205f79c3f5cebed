"""Dia in the commands: merge of checkpoints and adapters, evaluate, and the models that `app` plays."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_dia import PROMPTS, TINY, make_dia, make_processor
from transformers import DiaForConditionalGeneration

from trl_drcd.app.arguments import AppArguments
from trl_drcd.app.engine import Ask, Engine, Job
from trl_drcd.cli import main
from trl_drcd.policies import policy_for
from trl_drcd.policies.dia import LORA_TARGETS


@pytest.fixture
def folders(tmp_path):
    """A base and a trained model, each with its processor; and prompts."""
    for seed, name in enumerate(("base", "trained")):
        processor, model = make_processor(TINY, tmp_path / "dac"), make_dia(seed)
        policy_for(model, processor.tokenizer).prepare(model)
        model.generation_config.guidance_scale = 1.0
        model.save_pretrained(tmp_path / name), processor.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return tmp_path


def test_checkpoints_merge(folders):
    """Without mergekit, which cannot read the class."""
    base, trained, merged = (str(folders / name) for name in ("base", "trained", "merged"))
    main(["merge", "--models", base, trained, "--weights", "0.75", "0.25", "--out", merged])
    found = DiaForConditionalGeneration.from_pretrained(merged).state_dict()
    for name, tensor in make_dia(0).state_dict().items():
        torch.testing.assert_close(found[name], tensor.lerp(make_dia(1).state_dict()[name], 0.25))
    assert (folders / "merged" / "processor_config.json").is_file()


def test_adapters_merge_into_the_base(folders):
    base, adapter, merged = (str(folders / name) for name in ("base", "adapter", "merged"))
    model = DiaForConditionalGeneration.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGETS))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(adapter)
    model.generation_config.save_pretrained(adapter)
    main(["merge", "--models", adapter, "--weights", "1", "--out", merged, "--base_model", base])
    found = DiaForConditionalGeneration.from_pretrained(merged).state_dict()
    for name, tensor in peft.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_evaluate_measures_it(folders):
    """The guided base has no KL to the guided teacher, and the sounds are kept."""
    config = {
        "model": str(folders / "base"), "dataset": str(folders / "prompts.jsonl"), "num_prompts": 2,
        "samples_per_prompt": 2, "max_new_tokens": TINY.steps, "guidance_scale": 4, "output_dir": str(folders / "out"),
        "strategies": [
            {"name": "CFG", "guidance_scale": 4}, {"name": "trained", "models": [str(folders / "trained")]},
        ],
    }  # fmt: skip
    (folders / "evaluate.yaml").write_text(json.dumps(config))
    main(["evaluate", "--config", str(folders / "evaluate.yaml")])
    rows = [json.loads(line) for line in (folders / "out" / "results.jsonl").read_text().splitlines()]
    kl = {row["strategy"]: row["metrics"]["kl"]["mean"] for row in rows}
    assert abs(kl["CFG"]) < 1e-3 and kl["trained"] > 1
    assert all(row["kind"] == "music" for row in rows)
    assert len(list((folders / "out" / "samples").rglob("*.wav"))) == 8


def test_the_app_plays_it_and_counts_its_passes(folders):
    arguments = AppArguments(
        model=str(folders / "base"), ends=[str(folders / "base"), str(folders / "trained")], max_new_tokens=TINY.steps
    )
    engine = Engine(arguments)
    for scale in (1.0, 3.0):
        drawn = engine.sample(Ask("[S1] harp", (0.5, 0.5), scale, seed=1, samples=1), Job())
        ((waveform, rate),) = drawn.completions
        assert rate == 80 and waveform.std() > 0
        assert drawn.passes == pytest.approx(1 if scale == 1 else 2)
