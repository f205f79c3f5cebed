"""
Which generation config an adapter samples with, by every way to load it.

transformers and PEFT read that of the base. The tests that say so are there to fail when it changes: then
`load_adapter_model` and the sentence in the cards are no longer needed.
"""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import make_model
from merge_worlds import random_adapter, small_musicgen, tensors_of
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTextToWaveform,
    AutoTokenizer,
    GenerationConfig,
    MusicgenForConditionalGeneration,
    pipeline,
)

from trl_drcd.merging import interpolate_adapters, load_adapter_model, set_interpolation_weight

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing", "ignore:.*deprecated", "ignore:.*special to"
)
# As training writes it; the base decodes greedily, 2 tokens, and MusicGen's with guidance 3
OWN = {"do_sample": True, "temperature": 0.99, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0, "max_new_tokens": 8}


@pytest.fixture
def text(tmp_path, tokenizer):
    """A base that decodes greedily, two adapters as a training saves them, and what `interpolate_adapters` makes."""
    model = make_model(tokenizer)
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("trained", "other")):
        random_adapter(tmp_path / name, tmp_path / "base", seed)
        GenerationConfig(**OWN, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    interpolate_adapters([tmp_path / "trained", tmp_path / "other"], [0.5, 0.5], tmp_path / "merged")
    return tmp_path


@pytest.fixture
def music(tmp_path, tokenizer):
    """The same of a MusicGen, whose base has guidance on."""
    small_musicgen(tmp_path / "base", 0, tokenizer)
    targets = {"task_type": None, "target_modules": r".*decoder.*\.(q_proj|v_proj)"}
    for seed, name in enumerate(("trained", "other")):
        random_adapter(
            tmp_path / name, tmp_path / "base", seed, model_class=MusicgenForConditionalGeneration, **targets
        )
        ids = {"pad_token_id": 16, "bos_token_id": 16, "decoder_start_token_id": 16}
        GenerationConfig(**OWN, **ids).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    interpolate_adapters([tmp_path / "trained", tmp_path / "other"], [0.5, 0.5], tmp_path / "merged")
    return tmp_path


def assert_own(model) -> None:
    assert {name: getattr(model.generation_config, name) for name in OWN} == OWN


def is_adapted(model, base: Path, adapter: Path) -> bool:
    """Whether the logits are those of the base with the adapter."""
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.tensor([[1, 6, 9, 4]])
    return torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["trained", "merged"])
def test_a_text_adapter_with_its_own_config(text, name):
    folder = text / name
    model = load_adapter_model(folder)
    assert_own(model)
    assert is_adapted(model, text / "base", folder)
    config = GenerationConfig.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, generation_config=config)
    assert_own(plain)
    assert is_adapted(plain, text / "base", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for loaded in (model, plain):
        torch.manual_seed(0)
        generate = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
        samples = {generate("a slow tune")[0]["generated_text"] for _ in range(20)}
        assert len(samples) > 5  # draws
        inputs = tokenizer("a slow tune", return_tensors="pt", return_token_type_ids=False)
        assert len({tuple(loaded.generate(**inputs)[0].tolist()) for _ in range(20)}) > 5


def test_what_transformers_and_peft_read_by_themselves(text):
    folder = text / "trained"
    base = GenerationConfig.from_pretrained(text / "base")
    for model in (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(text / "base"), folder),
        pipeline("text-generation", model=str(folder)).model,
    ):
        config = model.generation_config
        assert (config.top_k, config.temperature, config.guidance_scale) == (base.top_k, None, None)


# ---------------------------------------------------------------- MusicGen


def rows_of(model, play) -> int:
    """Rows of the decoder's first step, codebooks and guidance included."""
    seen = []
    decoder = model.decoder
    forward = type(decoder).forward

    def watched(self, *args, **kwargs):
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]
        seen.append(ids.shape[0])
        return forward(self, *args, **kwargs)

    with mock.patch.object(type(decoder), "forward", watched):
        play()
    return seen[0]


@pytest.mark.parametrize("name", ["trained", "merged"])
def test_a_musicgen_adapter_samples_without_guidance(music, name):
    folder = music / name
    config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_adapter_model(folder)
    plain = AutoModelForTextToWaveform.from_pretrained(folder, generation_config=config)
    for loaded in (model, plain):
        assert_own(loaded)
        player = pipeline("text-to-audio", model=loaded, tokenizer=tokenizer)
        assert player.sampling_rate == 16000
        assert rows_of(loaded, lambda player=player: player("a slow tune")) == 2  # one row of two codebooks
        inputs = tokenizer("a slow tune", return_tensors="pt", return_token_type_ids=False)
        assert rows_of(loaded, lambda loaded=loaded, inputs=inputs: loaded.generate(**inputs)) == 2
    player = pipeline("text-to-audio", model=str(folder), generation_config=config)
    assert rows_of(player.model, lambda: player("a slow tune")) == 2
    player = pipeline("text-to-audio", model=str(folder))  # by itself: guidance, and so twice the rows
    assert player.model.generation_config.guidance_scale == 3.0
    assert rows_of(player.model, lambda: player("a slow tune", generate_kwargs={"max_new_tokens": 8})) == 4


# ---------------------------------------------------------------- the card and the edges


def test_the_code_in_the_card_runs(text, monkeypatch):
    card = (text / "merged" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(text)
    names: dict = {}
    exec(code, names)
    assert_own(names["model"])
    (call,) = re.findall(r"`(AutoModelForCausalLM\.from_pretrained\(.*?\))`", card)
    assert_own(
        eval(call, names | {"AutoModelForCausalLM": AutoModelForCausalLM, "GenerationConfig": GenerationConfig})
    )


def test_more_of_loading(text, tmp_path):
    (text / "merged" / "generation_config.json").unlink()
    assert load_adapter_model(text / "merged").generation_config.max_new_tokens == 2
    model = load_adapter_model(text / "trained", is_trainable=True, dtype=torch.float64)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_input_embeddings().weight.dtype == torch.float64
    model.load_adapter(str(text / "other"), "other")
    set_interpolation_weight(model, 0.5)
    assert_own(model)
    moved = (text / "base").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"`base_model`: .*/base does not exist; give the folder of a saved mod"
    ):
        load_adapter_model(text / "trained")
    assert_own(load_adapter_model(text / "trained", base_model=moved))
    with pytest.raises(FileNotFoundError, match=r"`adapter`: .*moved has no adapter_config.json"):
        load_adapter_model(moved)
    assert tensors_of(moved)
