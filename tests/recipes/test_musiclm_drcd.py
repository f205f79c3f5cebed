"""The music recipe end to end on a random model of a few thousand weights, and what it refuses before loading any."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")

from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import musiclm_drcd

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.callbacks import Deadline
from trl_drcd.prompts import load_prompts
from trl_drcd.reliability.checkpoints import commit, find_checkpoint

PROMPTS = ["a slow tune", "a fast tune", "a tune", "slow", "fast tune", "a slow fast tune"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """model, codec, embedder, prompts.jsonl: K = 2 codebooks of 8 entries, 6 words."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    codec = SpectralCodec(torch.randn(2, 8, 96), iterations=2)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<audio>", *(f"<a{k}_{c}>" for k in range(2) for c in range(8))]
    tokens += ["a", "slow", "fast", "tune"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <audio>", special_tokens=[("<s>", 1), ("<audio>", 4)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder / "model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    codec.save_pretrained(folder / "codec")
    MusicEmbedder(hidden_size=16, num_layers=1, num_heads=2, feed_forward_size=16).save_pretrained(folder / "embedder")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "x": 1}) + "\n" for p in PROMPTS))
    return folder


def arguments(world: Path, output: Path, **changed: object) -> list[str]:
    settings = {
        "model_name_or_path": world / "model", "codec": world / "codec", "embedder": world / "embedder",
        "dataset": world / "prompts.jsonl", "eval_dataset": world / "prompts.jsonl", "output_dir": output,
        "max_steps": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_eval_prompts": 2,
        "gradient_accumulation_steps": 1, "max_completion_length": 8, "gradient_checkpointing": False, "use_cpu": True,
        "bf16": False, "logging_steps": 1, "eval_strategy": "steps", "eval_on_start": True, "save_steps": 1,
        "diversity_coef": 5, "diversity_warmup_steps": 0, "num_samples": 2, "report_to": "none",
    }  # fmt: skip
    return [word for name, value in (settings | changed).items() for word in (f"--{name}", str(value))]


def play_the_example(output: Path, monkeypatch) -> None:
    """The card's own Python, from beside the model's folder: it writes a sound."""
    (example,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.S)
    monkeypatch.chdir(output.parent)
    exec(example, {})
    assert (output.parent / "sound.wav").read_bytes().startswith(b"RIFF")


def test_two_steps_and_what_they_leave(world, tmp_path, monkeypatch):
    output = tmp_path / "out"
    musiclm_drcd.main(arguments(world, output))
    before = AutoModelForCausalLM.from_pretrained(world / "model")
    after = AutoModelForCausalLM.from_pretrained(output)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert after.generation_config.guidance_scale in (None, 1.0)
    assert after.generation_config.do_sample and after.generation_config.top_k in (None, 0)
    assert AutoTokenizer.from_pretrained(output).padding_side == "left"
    assert not (output / "training_args.bin").exists()

    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_kl" in entry] == [0, 1, 2]
    assert [entry["diversity_coef"] for entry in log if "loss/diversity" in entry] == [5, 5]
    rows = [json.loads(line) for line in (output / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS[:2]
    assert all((output / "samples" / row["file"]).read_bytes().startswith(b"RIFF") for row in rows)
    card = (output / "README.md").read_text()
    assert "\n`model`, fine-tuned by" in card and "base_model" not in card  # a folder's name is nobody else's
    assert "| diversity_coef | 5 |" in card and "last (step 2)" in card
    assert str(world) not in card and "pipeline_tag: text-generation" in card
    play_the_example(output, monkeypatch)

    # The run goes on where it ended
    musiclm_drcd.main(arguments(world, output, max_steps=3, resume_from_checkpoint="true"))
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss/diversity" in entry] == [1, 2, 3]


def test_lora_with_a_yaml_file(world, tmp_path, capsys, monkeypatch):
    config, output = tmp_path / "run.yaml", tmp_path / "out"
    words = arguments(world, output, use_peft=True, lora_dropout=0, diversity_coef=0)
    names = [word.removeprefix("--") for word in words[::2]]
    settings = dict(zip(names, words[1::2], strict=True))
    settings |= {"lora_target_modules": ["q_proj", "v_proj"], "max_steps": 100}
    for name in ("embedder", "eval_dataset", "eval_strategy", "eval_on_start", "codec"):
        del settings[name]
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    musiclm_drcd.main(["--config", str(config), "--max_steps", "1", "--codec", str(world / "codec")])
    assert (output / "adapter_model.safetensors").exists() and (output / "generation_config.json").exists()
    assert (output / "codec" / "codec.safetensors").exists()
    assert {path.name for path in output.iterdir() if path.is_file()} >= {
        *("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    card = ModelCard.load(output / "README.md").data.to_dict()
    assert (card["pipeline_tag"], card["library_name"]) == ("text-generation", "peft")
    assert {"trl", "cfg-distillation"} <= set(card["tags"])
    assert "kl" in capsys.readouterr().out
    play_the_example(output, monkeypatch)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "none.jsonl"}, "`dataset=none.jsonl` is not a file"),
        ({"model_name_or_path": "./none"}, "`model_name_or_path=./none` is not a folder"),
        ({"codec": "./none"}, "`codec`: none has no config.json"),
        ({"top_k": 50}, "`top_k=50` samples from a different distribution"),
        ({"num_generations": 1}, "`num_generations` must be at least 2"),
        ({"resume_from_checkpoint": "true"}, "holds no checkpoint"),
        ({"config": "none.yaml"}, "none.yaml"),
    ],
)
def test_refusals_before_anything_is_loaded(world, tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr("trl.trainer.rloo_trainer.create_model_from_path", None)
    with pytest.raises(SystemExit, match=message):
        musiclm_drcd.main(arguments(world, tmp_path / "none", **changed))


def test_an_earlier_run_is_not_overwritten(world, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.rloo_trainer.create_model_from_path", None)
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "model.safetensors").write_bytes(b"weights")
    commit(tmp_path / "staged", tmp_path / "checkpoint-4")
    with pytest.raises(SystemExit, match=r"holds checkpoint-4 of an earlier run.*`resume_from_checkpoint=True`, or"):
        musiclm_drcd.main(arguments(world, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4"}


def test_prompt_files(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "negative_prompt"], ["one, two", "bad"], ["three", "worse"]])
    dataset = load_prompts("dataset", str(tmp_path / "a.csv"), "train")
    assert dataset.to_list() == [
        {"prompt": "one, two", "negative_prompt": "bad"}, {"prompt": "three", "negative_prompt": "worse"},
    ]  # fmt: skip
    dataset.to_parquet(tmp_path / "a.parquet")
    assert load_prompts("dataset", str(tmp_path / "a.parquet"), "train").to_list() == dataset.to_list()
    for text, message in (
        ('{"text": "x"}\n', r"must have a column `prompt`, got columns \['text'\]"),
        ('{"prompt": "x"}\n{"prompt": ""}\n', r"no prompt in rows \[1\]"),
        ("", "is empty"),
    ):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_prompts("dataset", str(tmp_path / "b.jsonl"), "train")
        (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ValueError, match="unknown format"):
        load_prompts("dataset", str(tmp_path / "c.txt"), "train")


def test_help_is_short_and_help_all_is_not(capsys):
    lengths = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            musiclm_drcd.main([flag])
        lengths.append(len(capsys.readouterr().out.splitlines()))
    assert lengths[0] < 200 < 500 < lengths[1]


def test_the_deadline_ends_training():
    control = type("Control", (), {"should_training_stop": False})()
    Deadline(10).on_step_end(None, None, control)
    assert not control.should_training_stop
    Deadline(-1).on_step_end(None, None, control)
    assert control.should_training_stop


def test_a_named_checkpoint_must_be_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json"):
        find_checkpoint(str(tmp_path), "unused")
