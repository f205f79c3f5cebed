"""SentenceEmbedder on a random encoder that reads 8 tokens at a time."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from trl_drcd import DiversityReward
from trl_drcd.text import SentenceEmbedder

sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = ["the", "moon", "is", "a", "jar", "of", "light", "and", "dust", "over", "old", "roofs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved sentence encoder: BERT over words, mean of its tokens, length 1; 6 words between [CLS] and [SEP]."""
    path = tmp_path_factory.mktemp("encoder")
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **names).save_pretrained(path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(path / "bert")
    from sentence_transformers import models as modules

    transformer = modules.Transformer(str(path / "bert"), max_seq_length=8)
    pooling = modules.Pooling(16)
    encoder = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    encoder.save(str(path / "encoder"))
    return str(path / "encoder")


@pytest.fixture(scope="module")
def embedder(folder):
    return SentenceEmbedder(folder, device="cpu")


def test_short_texts_are_the_encoders_own(embedder):
    texts = ["the moon is old", "dust and light", "a jar"]
    expected = embedder.model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(embedder(texts), expected)
    assert embedder(texts).shape == (3, 16)


def test_equal_texts_are_equal_whatever_stands_beside_them(embedder):
    alone, together = embedder(["a jar of dust"]), embedder(["a jar of dust", "the moon", "a jar of dust"])
    assert torch.equal(together[0], together[2])
    torch.testing.assert_close(alone[0], together[0])


def test_empty_texts_are_equal_and_have_a_direction(embedder):
    vectors = embedder(["", "  \n", "the moon"])
    assert torch.equal(vectors[0], vectors[1]) and not torch.allclose(vectors[0], vectors[2])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


def test_a_long_text_is_the_mean_of_its_windows(embedder):
    words = (WORDS * 2)[:15]  # windows of 6, 6 and 3 words
    first, second, third = embedder([" ".join(words[:6]), " ".join(words[6:12]), " ".join(words[12:])])
    mean = 6 * first + 6 * second + 3 * third
    torch.testing.assert_close(embedder([" ".join(words)])[0], mean / mean.norm())


def test_the_end_of_a_long_text_counts(embedder):
    start = " ".join(WORDS)
    one, other = embedder([start + " the moon", start + " old roofs"])
    assert (one - other).abs().max() > 1e-3


def test_as_reward_identical_completions_have_no_distance(embedder):
    reward = DiversityReward(embedder, num_generations=3)
    completions = ["the moon"] * 3 + ["", "the moon", "dust"]
    rewards = reward(prompts=["p"] * 6, completions=completions, completion_ids=[[1]] * 6)
    assert rewards[:3] == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(value > 0.001 for value in rewards[3:])


def test_conversations_are_embedded_by_their_text(embedder):
    reward = DiversityReward(embedder, num_generations=2)
    turns = [[{"role": "assistant", "content": text}] for text in ("the moon", "dust and light")]
    torch.testing.assert_close(reward.embed(turns, [[1], [2]]), embedder(["the moon", "dust and light"]))


def test_modules_from_elsewhere_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "encoder")
    file = tmp_path / "encoder" / "modules.json"
    modules = json.loads(file.read_text())
    modules[1]["type"] = "os.path.Pooling"
    file.write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"names a module of type 'os\.path\.Pooling' in modules\.json"):
        SentenceEmbedder(str(tmp_path / "encoder"), device="cpu")


def test_other_things_than_texts_are_refused(embedder):
    with pytest.raises(TypeError, match="`texts` must be strings, got int"):
        embedder(["the moon", 3])
