"""The music recipe on a random MusicGen: no codec to give, full weights and LoRA, and what it leaves."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")

import soundfile
from test_musicgen import BOOKS, PROMPTS, STEPS, make_musicgen, t5_tokenizer  # noqa: F401
from transformers import MusicgenForConditionalGeneration, pipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import musiclm_drcd
from test_musiclm_drcd import play_the_example

from trl_drcd.audio import MusicEmbedder
from trl_drcd.policies.musicgen import LORA_TARGETS


@pytest.fixture(scope="module")
def world(tmp_path_factory, t5_tokenizer) -> Path:  # noqa: F811
    """model, embedder, prompts.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    make_musicgen(rate=16000).save_pretrained(folder / "model")
    t5_tokenizer.save_pretrained(folder / "model")
    MusicEmbedder(hidden_size=16, num_layers=1, num_heads=2, feed_forward_size=16).save_pretrained(folder / "embedder")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return folder


def arguments(world: Path, output: Path, **changed: object) -> list[str]:
    settings = {
        "model_name_or_path": world / "model", "embedder": world / "embedder", "dataset": world / "prompts.jsonl",
        "eval_dataset": world / "prompts.jsonl", "output_dir": output, "max_steps": 2, "max_eval_prompts": 2,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
        "max_completion_length": STEPS, "use_cpu": True, "bf16": False, "logging_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "save_steps": 1, "diversity_coef": 5, "diversity_warmup_steps": 0, "num_samples": 2,
        "report_to": "none",
    }  # fmt: skip
    return [word for name, value in (settings | changed).items() for word in (f"--{name}", str(value))]


def test_two_steps_and_what_they_leave(world, tmp_path, monkeypatch):
    output = tmp_path / "out"
    musiclm_drcd.main(arguments(world, output))
    player = pipeline("text-to-audio", model=str(output))
    assert player.model.generation_config.guidance_scale in (None, 1.0)
    assert player.model.generation_config.top_k in (None, 0)
    assert player("fast drum", generate_kwargs={"max_new_tokens": STEPS})["sampling_rate"] == 16000
    before = MusicgenForConditionalGeneration.from_pretrained(world / "model").state_dict()
    after = player.model.state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not value.equal(after[name])}
    assert changed == {"decoder"}
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_kl" in entry] == [1, 2]
    assert all(entry["diversity"] > 0 for entry in log if "kl" in entry)
    sound, rate = soundfile.read(output / "samples" / "01.wav")
    assert (len(sound), rate) == (8 * (STEPS - BOOKS + 1), 16000)
    assert "pipeline_tag: text-to-audio" in (output / "README.md").read_text()
    play_the_example(output, monkeypatch)
    assert not (output / "codec").exists()


def test_lora_leaves_an_adapter(world, tmp_path, monkeypatch):
    lora = {"use_peft": True, "lora_r": 2, "lora_dropout": 0}
    musiclm_drcd.main([*arguments(world, tmp_path / "lora", **lora), "--lora_target_modules", *LORA_TARGETS])
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(LORA_TARGETS)
    assert (tmp_path / "lora" / "samples" / "01.wav").exists()
    play_the_example(tmp_path / "lora", monkeypatch)
