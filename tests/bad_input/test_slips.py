"""Slips of a newcomer: each is told before anything is computed, in words that say what would be right."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel
from trl import ModelConfig, RLOOConfig

from tests.conftest import make_model
from tests.test_trainer import make_trainer, rows
from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.cli import main
from trl_drcd.evaluation.strategies import expand
from trl_drcd.guidance import generate_guided
from trl_drcd.launch.training import peft_config
from trl_drcd.merging import interpolate_checkpoints
from trl_drcd.scripts import train_text
from trl_drcd.text import SentenceEmbedder


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_a_file_of_arguments_without_its_flag(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "run.yaml"])
    assert "is given as `--config run.yaml`" in f"{error.value}{capsys.readouterr().err}"


def test_a_file_of_arguments_without_its_flag_in_training():
    with pytest.raises(SystemExit, match=r"given as `--config run.yaml`"):
        train_text.main(["run.yaml"])


def test_the_config_of_trl_itself(tmp_path, tokenizer):
    args = RLOOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`args` must be a `CFGDistillDiversityConfig`, got RLOOConfig"):
        CFGDistillDiversityTrainer(make_model(tokenizer), args=args, train_dataset=rows(), processing_class=tokenizer)


def test_an_encoder_as_the_model(tmp_path, tokenizer):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`model=.*bert` is a BertModel, which cannot generate; give a causal LM"):
        make_trainer(tmp_path / "run", tokenizer, str(tmp_path / "bert"))


def test_a_language_model_as_the_embedder(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"`model=.*lm` is a causal LM, which was not trained to compare texts"):
        SentenceEmbedder(str(tmp_path / "lm"))


@pytest.mark.parametrize("which", ["prompt_ids", "negative_prompt_ids"])
def test_tensors_as_prompts(tokenizer, which):
    given = {"prompt_ids": [[1, 5]], "negative_prompt_ids": [[1]]}
    given[which] = torch.tensor(given[which])
    with pytest.raises(TypeError, match=f"`{which}` must be lists of token ids, unpadded, got a tensor"):
        generate_guided(make_model(tokenizer), **given, guidance_scale=3.0)


def test_a_folder_that_is_missing_beside_an_adapter(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "quality")
    with pytest.raises(FileNotFoundError, match="outputs/diversty is not a folder, and not found on the Hub"):
        expand([{"name": "LERP", "models": [str(tmp_path / "quality"), "outputs/diversty"]}])


@pytest.mark.parametrize(
    ("given", "kept"),
    [(["q_proj"], {"q_proj"}), (["q_proj", "v_proj"], {"q_proj", "v_proj"}), (["all-linear"], "all-linear"),
     ([r".*\.q_proj"], r".*\.q_proj")],
)  # fmt: skip
def test_one_module_of_lora_is_a_name_and_no_pattern(given, kept):
    assert peft_config(ModelConfig("m", use_peft=True, lora_target_modules=given)).target_modules == kept


def test_models_of_different_sizes_are_told_by_their_sizes(tmp_path, tokenizer):
    for size, name in ((16, "small"), (32, "large")):
        model = make_model(tokenizer, hidden_size=size)
        model.config._model_name_or_path = name
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"`hidden_size` is 16 in .* and 32"):
        interpolate_checkpoints([tmp_path / "small", tmp_path / "large"], [0.5, 0.5], tmp_path / "merged")
