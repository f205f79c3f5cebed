"""The CLAP judge on a tiny CLAP with random weights, made by transformers' own classes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor

from tests.conftest import make_model
from trl_drcd.audio import ClapJudge
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.checks import check_parts
from trl_drcd.evaluation.digests import content_digest

RATE = 48000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "projection_dim": 8, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    audio = {"spec_size": 64, "num_mel_bins": 16, "hidden_size": 32, "depths": [1, 1], "num_hidden_layers": 2,
             "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16, "projection_dim": 8,
             "window_size": 4}  # fmt: skip
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))
    extractor = ClapFeatureExtractor(feature_size=16, sampling_rate=RATE, max_length_s=1, truncation="rand_trunc")
    path = tmp_path_factory.mktemp("clap")
    model.save_pretrained(path)
    ClapProcessor(extractor, copy.deepcopy(tokenizer)).save_pretrained(path)  # which marks it as a processor's
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return ClapJudge.from_pretrained(folder)


def clip(seed: int, seconds: float = 1.0, rate: int = RATE) -> tuple[torch.Tensor, int]:
    return torch.randn(int(seconds * rate), generator=torch.Generator().manual_seed(seed)) * 0.1, rate


def test_adherence_is_the_models_own_cosine(judge):
    captions, audio = ["a slow tune for flute", "harp"], [clip(0), clip(1)]
    inputs = judge.processor.tokenizer(captions, padding=True, return_tensors="pt")
    features = judge.processor.feature_extractor(
        [a.numpy() for a, _ in audio], sampling_rate=RATE, return_tensors="pt"
    )
    with torch.no_grad():
        output = judge.model(**inputs, **features)
    expected = torch.nn.functional.cosine_similarity(output.text_embeds, output.audio_embeds)
    torch.testing.assert_close(judge.adherence(captions, audio), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_a_clip_has_one_embedding_whatever_stands_beside_it(judge, truncation, seconds):
    if truncation == "fusion":  # transformers' extractor knows 64 bands only there
        config = copy.deepcopy(judge.model.config)
        for name, value in {"enable_fusion": True, "spec_size": 256, "num_mel_bins": 64}.items():
            setattr(config.audio_config, name, value)
        torch.manual_seed(0)
        extractor = ClapFeatureExtractor(feature_size=64, sampling_rate=RATE, max_length_s=1, truncation="fusion")
        judge = ClapJudge(ClapModel(config).eval(), SimpleNamespace(feature_extractor=extractor))
    alone = judge([clip(0, seconds)])
    beside = judge([clip(0, seconds), clip(1, 0.3), clip(0, seconds), clip(2, 1.7), clip(0, seconds)])
    for place in (0, 2, 4):
        torch.testing.assert_close(beside[place], alone[0], atol=1e-5, rtol=0)


def test_it_is_an_embedder(judge):
    audio = [clip(0), clip(1, 0.3), clip(2, 2.5), (torch.zeros(0), RATE), clip(3, 1.0, 16000)]
    embeddings = judge(audio)
    assert embeddings.shape == (5, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    assert torch.equal(embeddings, judge(audio))  # long clips are cut at random, but always alike
    one_by_one = ClapJudge(judge.model, judge.processor, batch_size=1)
    torch.testing.assert_close(one_by_one(audio[:2]), embeddings[:2], atol=1e-5, rtol=0)
    assert judge([]).shape == (0, 8)


def test_bad_input_is_refused(judge):
    with pytest.raises(ValueError, match="got 1 `captions` and 2 clips"):
        judge.adherence(["harp"], [clip(0), clip(1)])
    with pytest.raises(ValueError, match="average the channels"):
        judge([(torch.zeros(2, 100), RATE)])


def test_a_clap_passes_the_checks_before_an_evaluation(folder, tokenizer, tmp_path):
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    SpectralCodec(torch.randn(2, 2, 96)).save_pretrained(tmp_path / "codec")
    arguments = {"clap": str(folder), "codec": str(tmp_path / "codec")}
    check_parts(EvaluateArguments(str(tmp_path / "model"), "none", **arguments), content_digest)
