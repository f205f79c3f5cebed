"""The text-audio judge."""

import math

import pytest
import torch

from trl_drcd.audio import PreferenceModel, TextAudioJudge
from trl_drcd.audio.judges import bradley_terry_loss

RATE = 16000
LABELS = {"instrument": ["flute", "piano", "violin"], "tempo": ["slow", "fast"]}


@pytest.fixture(scope="module")
def judge() -> TextAudioJudge:
    torch.manual_seed(0)
    return TextAudioJudge(
        ["a", "minor", "slow", "tune", "flute", "c#"], LABELS, n_fft=512, hop_length=400, n_mels=16, window=6400,
        channels=[4, 8], text_size=8, feature_size=16, embedding_size=8, mel_mean=-2.0, mel_std=3.0,
    ).eval()  # fmt: skip


def tone(frequency: float, seconds: float) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * RATE)) / RATE)


@pytest.fixture(scope="module")
def audio() -> list[tuple[torch.Tensor, int]]:
    return [(tone(440, 0.4), RATE), (tone(330, 0.05), RATE), (tone(550, 1.1), RATE), (torch.zeros(0), RATE)]


def test_adherence(judge, audio):
    captions = ["a slow tune", "flute", "a tune in A minor", ""]
    cosines = judge.adherence(captions, audio)
    assert cosines.shape == (4,) and cosines.dtype == torch.float32 and not cosines.requires_grad
    assert (cosines.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(cosines, judge.adherence(captions, audio), atol=0, rtol=0)
    alone = torch.cat([judge.adherence([text], [clip]) for text, clip in zip(captions, audio, strict=True)])
    torch.testing.assert_close(cosines, alone, atol=1e-5, rtol=0)
    assert judge.adherence([], []).shape == (0,)


def test_embeddings(judge, audio):
    text, sound = judge.embed_text(["a tune", "flute"]), judge.embed_audio(audio)
    assert text.shape == (2, 8) and sound.shape == (4, 8)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(sound.norm(dim=1), torch.ones(4))


def test_classify(judge, audio):
    labels = judge.classify(audio)
    assert list(labels) == ["instrument", "tempo"]
    assert all(len(labels[name]) == 4 and set(labels[name]) <= set(LABELS[name]) for name in LABELS)
    assert labels == judge.classify(audio)
    assert judge.classify([]) == {"instrument": [], "tempo": []}


def test_words(judge):
    ids = judge.word_tensor(["A slow tune, in C# minor", "SLOW tune", "???"])
    assert ids.shape == (3, 6)
    assert ids[0].tolist() == [2, 4, 5, 1, 7, 3]  # "in" is not in the vocabulary
    assert ids[1].tolist() == [4, 5, 0, 0, 0, 0]
    assert ids[2].tolist() == [1, 0, 0, 0, 0, 0]
    # Padding changes nothing.
    unpadded = judge.text_embeddings(judge.word_tensor(["slow tune"]))
    torch.testing.assert_close(judge.text_embeddings(ids)[1:2], unpadded)


def test_the_order_of_words_counts(judge):
    one, other = judge.text_embeddings(judge.word_tensor(["a minor tune", "minor a tune"]))
    assert not torch.allclose(one, other)


def test_silence_is_left_out_of_the_average(judge):
    frames = judge.log_mel(torch.randn(1, judge.window))
    changed = frames.clone()
    changed[:, 15:] += 3.0  # seen from the third position of four frames on
    count = torch.tensor([8])
    torch.testing.assert_close(judge.audio_features(frames, count), judge.audio_features(changed, count))


def test_bad_input_is_refused(judge, audio):
    with pytest.raises(ValueError, match="got 1 `captions` and 4 clips"):
        judge.adherence(["a tune"], audio)
    with pytest.raises(ValueError, match="average the channels"):
        judge.classify([(torch.zeros(2, 100), RATE)])


def test_save_and_load(judge, audio, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = TextAudioJudge.from_pretrained(tmp_path)
    assert loaded.config == judge.config and not loaded.training
    captions = ["a slow tune"] * 4
    torch.testing.assert_close(loaded.adherence(captions, audio), judge.adherence(captions, audio), atol=0, rtol=0)
    assert loaded.classify(audio) == judge.classify(audio)


@pytest.fixture(scope="module")
def preference() -> PreferenceModel:
    torch.manual_seed(0)
    return PreferenceModel(n_fft=512, hop_length=400, n_mels=16, window=6400, channels=[4, 8], feature_size=16).eval()


def test_preference_scores(preference, audio, tmp_path):
    scores = preference.preference(audio)
    assert scores.shape == (4,) and not scores.requires_grad
    alone = torch.cat([preference.preference([clip]) for clip in audio])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    preference.save_pretrained(tmp_path)
    assert torch.equal(PreferenceModel.from_pretrained(tmp_path).preference(audio), scores)


def test_bradley_terry_loss():
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    odds = torch.tensor([math.e / (math.e + 1), 1 / (1 + math.e**2)])  # exp(s_a) / (exp(s_a) + exp(s_b))
    torch.testing.assert_close(bradley_terry_loss(better, worse), -odds.log().mean())


def test_preference_learns_from_pairs(preference):
    """Tones against noise: the score comes to tell them apart, on clips that it has not seen."""
    model = PreferenceModel(**preference.config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)

    def pair(frequency: float) -> tuple[torch.Tensor, torch.Tensor]:
        good = tone(frequency, 0.4)
        return good, good + 0.3 * torch.randn(good.shape, generator=generator)

    for _ in range(15):
        better, worse = zip(*(pair(f) for f in (torch.rand(8, generator=generator) * 800 + 200).tolist()), strict=True)
        frames = model.log_mel(torch.stack([wave / wave.square().mean().sqrt() for wave in (*better, *worse)]))
        scores = model.scores(model.audio_features(frames, torch.full((16,), frames.shape[1])))
        loss = bradley_terry_loss(*scores.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    good, bad = zip(*(pair(f) for f in (250.0, 450.0, 650.0, 850.0)), strict=True)
    better, worse = (model.preference([(wave, RATE) for wave in side]) for side in (good, bad))
    assert (better > worse).all()
