"""The music embedding model and the front end it shares with the judge."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.embedder import PAPER, Attention
from trl_drcd.audio.front_end import LogMel, audio_windows

RATE = 16000


@pytest.fixture(scope="module")
def embedder() -> MusicEmbedder:
    torch.manual_seed(0)
    # 4 patches of 4 frames of 400 samples: windows of 0.4 s.
    return MusicEmbedder(
        n_fft=512, hop_length=400, n_mels=20, patch_frames=4, num_patches=4, hidden_size=16, num_layers=2, num_heads=2,
        feed_forward_size=32, embedding_size=12, mel_mean=-2.0, mel_std=3.0,
    ).eval()  # fmt: skip


def tone(frequency: float, seconds: float, rate: int = RATE) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * rate)) / rate)


def test_shape_type_and_length(embedder):
    embeddings = embedder([(tone(440, 0.4), RATE), (tone(330, 0.1), RATE), (tone(550, 1.1), RATE)])
    assert embeddings.shape == (3, 12)
    assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_the_rest_of_the_list_changes_nothing(embedder):
    audio = [(tone(440, seconds), RATE) for seconds in (0.03, 0.2, 0.4, 0.75, 2.0)]
    together = embedder(audio)
    alone = torch.cat([embedder([pair]) for pair in audio])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, embedder(audio), atol=0, rtol=0)


def test_many_windows_equal_one_by_one(embedder):
    audio = [(tone(200 + 10 * index, 0.1 + 0.04 * index), RATE) for index in range(40)]  # several internal batches
    alone = torch.cat([embedder([pair]) for pair in audio])
    torch.testing.assert_close(embedder(audio), alone, atol=1e-5, rtol=0)


def test_a_long_clip_is_the_mean_over_all_its_windows(embedder):
    torch.manual_seed(1)
    first, second = torch.randn(2, embedder.window)
    first, second = (wave / wave.square().mean().sqrt() for wave in (first, second))  # so that loudness agrees
    frames = embedder.log_mel(torch.stack([first, second]))
    sums = embedder.encode(frames, torch.tensor([4, 4]))
    expected = embedder.project(sums.sum(0, keepdim=True) / 8)
    torch.testing.assert_close(embedder([(torch.cat([first, second]), RATE)]), expected.detach(), atol=1e-5, rtol=0)


def test_what_lies_beyond_a_short_clip_is_not_heard(embedder):
    frames = embedder.log_mel(torch.randn(1, embedder.window))
    changed = frames.clone()
    changed[:, 8:] += 5.0  # patches 2 and 3
    count = torch.tensor([2])
    torch.testing.assert_close(embedder.encode(frames, count), embedder.encode(changed, count))


def test_silence_and_empty_audio(embedder):
    silent = [(torch.zeros(6400), RATE), (torch.zeros(0), RATE), (torch.zeros(1), RATE), (torch.zeros(6400), 32000)]
    embeddings = embedder(silent)
    assert torch.isfinite(embeddings).all()
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embeddings[1], embeddings[2])  # no sample, and one silent sample: one patch of silence
    assert embedder([]).shape == (0, 12)


def test_loudness_does_not_count(embedder):
    loud, quiet = embedder([(tone(440, 0.4), RATE), (0.01 * tone(440, 0.4), RATE)])
    torch.testing.assert_close(loud, quiet, atol=1e-4, rtol=0)


def test_samples_beyond_one_are_not_clipped_and_clipped_sound_is_another(embedder):
    wave = 4 * tone(440, 0.4)  # peak 1.2
    quiet, beyond, clipped = embedder([(0.5 * wave, RATE), (wave, RATE), (wave.clamp(-0.3, 0.3), RATE)])
    torch.testing.assert_close(quiet, beyond, atol=1e-4, rtol=0)
    assert torch.isfinite(clipped).all() and (clipped - beyond).abs().max() > 1e-3


def test_other_sampling_rates_are_resampled(embedder):
    same, other = embedder([(tone(440, 0.4), RATE), (tone(440, 0.4, 32000), 32000)])
    assert torch.dot(same, other) > 0.999
    unresampled = embedder([(tone(440, 0.4, 32000), RATE)])[0]
    assert torch.dot(same, unresampled) < torch.dot(same, other)


def test_numpy_and_float64_are_taken(embedder):
    expected = embedder([(tone(440, 0.4), RATE)])
    torch.testing.assert_close(embedder([(tone(440, 0.4).double().numpy(), RATE)]), expected)


@pytest.mark.parametrize(
    ("waveform", "rate", "error", "message"),
    [
        (torch.zeros(2, 800), RATE, ValueError, r"audio\[1\] has shape \(2, 800\).*average the channels"),
        (torch.tensor([0.0, float("nan")]), RATE, ValueError, r"audio\[1\] has NaN"),
        (torch.zeros(800, dtype=torch.int16), RATE, TypeError, r"audio\[1\] has samples of type torch.int16"),
        (torch.zeros(800), 0, ValueError, r"audio\[1\] has sampling rate 0"),
        (torch.zeros(800), 44100.5, ValueError, r"audio\[1\] has sampling rate 44100.5"),
    ],
)
def test_bad_audio_is_refused(embedder, waveform, rate, error, message):
    with pytest.raises(error, match=message):
        embedder([(tone(440, 0.1), RATE), (waveform, rate)])


def test_save_and_load(embedder, tmp_path):
    embedder.save_pretrained(tmp_path / "e")
    assert {file.name for file in (tmp_path / "e").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "MusicEmbedder.from_pretrained" in (tmp_path / "e" / "README.md").read_text()
    loaded = MusicEmbedder.from_pretrained(tmp_path / "e")
    assert loaded.config == embedder.config and not loaded.training
    audio = [(tone(440, 0.7), RATE)]
    torch.testing.assert_close(loaded(audio), embedder(audio), atol=0, rtol=0)


def test_saving_again_keeps_the_model_card(embedder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    embedder.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_upload_and_download(embedder, tmp_path, monkeypatch):
    """What goes to the hub is the folder, and it comes back from there; the network is left out."""
    uploaded = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **kwargs: shutil.copytree(folder_path, tmp_path / "hub"),
    )
    embedder.push_to_hub("me/embedder")
    assert {file.name for file in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}

    def download(repo_id, filename, **kwargs):
        uploaded[filename] = repo_id
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr("trl_drcd.audio.front_end.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    loaded = MusicEmbedder.from_pretrained("me/embedder")
    assert uploaded == {"config.json": "me/embedder", "model.safetensors": "me/embedder"}
    audio = [(tone(440, 0.7), RATE)]
    torch.testing.assert_close(loaded(audio), embedder(audio), atol=0, rtol=0)


def test_the_papers_model():
    model = MusicEmbedder(**PAPER)
    assert 24e6 < sum(p.numel() for p in model.parameters()) < 27e6
    assert model.window == 64000 and model.embedding_size == 192
    assert model.encoder.layers[0].self_attn.out_proj.in_features == 6 * 85


def test_attention_is_torchs():
    ours, theirs = Attention(16, 2, 8), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    hidden, present = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [3], [1]])
    expected = theirs(hidden, hidden, hidden, key_padding_mask=~present, need_weights=False)[0]
    torch.testing.assert_close(ours(hidden, present), expected)


def test_loading_something_else_is_refused(embedder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        MusicEmbedder.from_pretrained(tmp_path)
    embedder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_class": "TextAudioJudge"}))
    with pytest.raises(ValueError, match="holds a TextAudioJudge; expected a MusicEmbedder"):
        MusicEmbedder.from_pretrained(tmp_path)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`hidden_size=16` must be a multiple of `num_heads=3`"):
        MusicEmbedder(hidden_size=16, num_heads=3)


def test_windows_of_clips():
    audio = [(torch.ones(5), 10), (torch.zeros(0), 10), (torch.ones(8), 10)]
    windows, lengths, owners = audio_windows(audio, 10, 4)
    assert windows.shape == (5, 4)
    assert lengths.tolist() == [4, 1, 1, 4, 4]
    assert owners.tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(windows[1], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_log_mel_of_a_tone_peaks_in_its_band():
    log_mel = LogMel(RATE, 1024, 500, 64, 0.0, 1.0)
    frames = log_mel(tone(1000, 1.0)[None])
    assert frames.shape == (1, 32, 64)
    peak = frames[0, 16].argmax()
    assert log_mel.filters[64, peak] > 0  # bin 64 of 1024 is 1000 Hz
