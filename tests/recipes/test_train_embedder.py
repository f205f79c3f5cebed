"""Training an embedding model on a folder of audio."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_metric_learning")
soundfile = pytest.importorskip("soundfile")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "music"))

import embedder_data  # noqa: E402
import train_embedder  # noqa: E402

from trl_drcd.audio import MusicEmbedder  # noqa: E402

RATE = 16000


def tone(frequency: float, samples: int = RATE) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(samples) / RATE)


def loudest_hz(waveform: torch.Tensor) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * RATE / len(waveform)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six recordings of 8.5 s, one of them stereo at 22.05 kHz, and one that is too short."""
    path, generator = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for index in range(6):
        rate = 22050 if index == 0 else RATE
        time = np.arange(int(8.5 * rate)) / rate
        wave = 0.2 * np.sin(2 * np.pi * 220 * (index + 1) * time) + 0.01 * generator.normal(size=len(time))
        (path / "deep").mkdir(exist_ok=True)
        soundfile.write(path / "deep" / f"{index}.wav", np.stack([wave, wave], 1) if index == 0 else wave, rate)
    soundfile.write(path / "short.flac", np.zeros(RATE), RATE)
    return path


def arguments(folder, output, **overrides):
    settings = {"steps": 4, "recordings_per_batch": 4, "save_steps": 2, "logging_steps": 1, "versions": 2}
    return train_embedder.Arguments(dataset=str(folder), output_dir=str(output), **settings | overrides)


def run(args):
    return train_embedder.train(train_embedder.load_recordings(args), args)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    return run(arguments(folder, output)), output


def test_it_writes_model_log_and_one_checkpoint(trained, folder, capsys):
    embedder, output = trained
    assert {"config.json", "model.safetensors", "README.md", "log.jsonl", "checkpoint-2"} <= {
        file.name for file in output.iterdir()
    }
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(np.isfinite(losses))
    audio = [(0.1 * torch.randn(RATE), RATE)]
    assert torch.equal(MusicEmbedder.from_pretrained(output)(audio), embedder(audio))


def test_a_resumed_run_ends_with_the_same_weights(trained, folder, tmp_path):
    embedder, output = trained
    (tmp_path / "checkpoint-2").symlink_to(output / "checkpoint-2")
    again = run(arguments(folder, tmp_path, resume_from_checkpoint="true"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, embedder.state_dict()[name]), name


def test_short_recordings_are_left_out_aloud(folder, capsys):
    args = arguments(folder, "unused")
    heard = embedder_data.Heard(train_embedder.load_recordings(args), MusicEmbedder(), None, 0)
    assert len(embedder_data.long_enough(heard, False)) == 6
    assert "1 of 7 recordings are shorter than 8 s" in capsys.readouterr().out


def test_versions_are_kept_as_they_are_heard(folder, tmp_path):
    args = arguments(folder, tmp_path)
    heard = embedder_data.Heard(train_embedder.load_recordings(args), MusicEmbedder(), None, 0)
    kept = embedder_data.Kept(heard, [1, 3], 2, tmp_path / "kept.npy", False)
    for item in [(1, 0), (3, 1)]:
        assert all(torch.equal(a, b) for a, b in zip(heard[item], kept[item], strict=True))
    assert not torch.equal(kept[1, 0][0], kept[1, 1][0])


class SpyCodec:
    """Passes audio on, and keeps what it was given."""

    def __init__(self):
        self.given = []

    def encode(self, waveforms):
        self.given.append(waveforms.clone())
        return waveforms

    def decode_codes(self, codes):
        return codes


def test_about_half_of_the_chunks_go_through_the_codec_at_their_own_loudness(folder):
    recordings, codec = train_embedder.load_recordings(arguments(folder, "unused")), SpyCodec()
    heard = embedder_data.Heard(recordings, MusicEmbedder(), codec, 0)
    for version in range(20):
        heard[2, version]
    given = torch.cat(codec.given)
    assert {len(part) for part in codec.given} == {1, 2}  # one chunk of a pair, or both
    assert 12 <= len(given) <= 28  # of 40
    samples, _ = recordings[2]
    torch.testing.assert_close(given.square().mean(), torch.tensor((samples**2).mean()), rtol=0.02, atol=0)


def test_half_of_the_chunks_are_changed():
    log_mel, waveforms = MusicEmbedder().log_mel, 0.1 * torch.randn(64, RATE)
    clean = torch.stack([embedder_data.clean_waveform(wave, RATE, 0, RATE) for wave in waveforms])
    frames, shares = embedder_data.augmented(waveforms, log_mel, RATE, torch.Generator().manual_seed(0))
    same = (frames - log_mel(clean)).abs().amax((1, 2)) < 1e-3
    assert 20 <= int(same.sum()) <= 44
    assert (shares[same] == 1).all() and not (shares[~same] == 1).all()


def test_resampling_changes_pitch_and_stretching_does_not():
    waveforms = torch.stack([tone(440), tone(440)])
    faster = embedder_data.resampled(waveforms, torch.tensor([1.0, 1.25]))
    torch.testing.assert_close(faster[0], waveforms[0])
    assert loudest_hz(faster[1, : RATE // 2]) == pytest.approx(550, abs=4)
    assert (faster[1, int(RATE / 1.25) + 1 :] == 0).all()
    frames = torch.arange(10.0)[None, :, None].expand(2, 10, 3)
    stretched = embedder_data.stretched(frames, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(stretched[0], frames[0])
    torch.testing.assert_close(stretched[1, :, 0], torch.tensor([0.0, 2, 4, 6, 8, 9, 9, 9, 9, 9]))


def test_chunks_do_not_overlap():
    waveform = torch.arange(100.0)
    for seed in range(20):
        first, second = embedder_data.two_chunks(waveform, 40, torch.Generator().manual_seed(seed))
        assert first[-1] < second[0] and len(first) == len(second) == 40


def test_processes_share_the_batch(folder):
    args = arguments(folder, "unused")
    whole = list(train_embedder.Plan(range(7), args, 0, 0, 1))
    halves = [list(train_embedder.Plan(range(7), args, 0, process, 2)) for process in (0, 1)]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(halves[0][step] + halves[1][step])
    assert list(train_embedder.Plan(range(7), args, 2, 0, 1)) == whole[2:]


def test_arrays_of_recordings(tmp_path):
    np.save(tmp_path / "a.npy", np.full((3, 8), 16384, np.int16))
    samples, rate = embedder_data.open_recordings(str(tmp_path / "a.npy"), "train", "audio", 8000)[1]
    assert rate == 8000 and samples.dtype == np.float32 and (samples == 0.5).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"recordings_per_batch": 100}, "has 7 recordings, fewer than `recordings_per_batch=100`"),
        ({"recordings_per_batch": 7}, "has 6 recordings that are long enough, fewer than `recordings_per_batch=7`"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(arguments(folder, tmp_path, **overrides))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train_embedder.load_recordings(arguments(tmp_path / "nowhere", tmp_path))
