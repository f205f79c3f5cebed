"""The spectral codec: quantisation against brute force, token streams, waveforms, files."""

import math
from pathlib import Path

import pytest
import torch

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec, fit_codebooks, mel_matrix, nearest, overlap_add
from trl_drcd.files import wav_bytes

K, C, MELS = 2, 8, 32


@pytest.fixture
def codec():
    generator = torch.Generator().manual_seed(0)
    return SpectralCodec(torch.randn(K, C, MELS, generator=generator), first_token_id=5)


def tone(frequency: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * frequency * torch.arange(int(16000 * seconds)) / 16000)


def test_residual_quantisation_is_greedy_nearest_neighbour(codec):
    frames = torch.randn(2, 3, MELS)
    codes = codec.quantise(frames)
    residual = frames.reshape(-1, MELS)
    for k in range(K):
        expected = torch.cdist(residual, codec.codebooks[k]).argmin(1)
        torch.testing.assert_close(codes[..., k].flatten(), expected)
        residual = residual - codec.codebooks[k][expected]
    torch.testing.assert_close(codec.decode_log_mel(codes).reshape(-1, MELS), frames.reshape(-1, MELS) - residual)


def test_codebooks_find_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    offsets = torch.tensor(
        [[0.5, 0.0], [-0.5, 0.0]]
    )  # the same in every cluster: what the second codebook has to code
    frames = (centres[:, None, None] + offsets[:, None]).expand(3, 2, 20, 2).reshape(-1, 2)
    coarse, fine = fit_codebooks(frames, 2, 3, seed=0)
    torch.testing.assert_close(coarse[nearest(centres, coarse)], centres)
    torch.testing.assert_close(fine[nearest(offsets, fine)], offsets)


def test_fit_needs_enough_frames():
    with pytest.raises(ValueError, match="at least `codebook_size=8` rows, got 7"):
        fit_codebooks(torch.zeros(7, 4), 1, 8)


def test_log_mel_shows_a_tone_at_its_frequency():
    codec = SpectralCodec(torch.zeros(1, 1, 96))
    log_mel = codec.log_mel(tone(1000.0))
    assert log_mel.shape == (1, 25, 96)  # 25 frames a second
    centres = (mel_matrix(2048, 96, 16000) * torch.linspace(0, 8000, 1025)[:, None]).sum(0) / mel_matrix(
        2048, 96, 16000
    ).sum(0)
    peaks = centres[log_mel[0, 2:-2].argmax(-1)]
    assert (peaks - 1000).abs().max() < 30
    torch.testing.assert_close(codec.log_mel(torch.zeros(16000)), torch.full((1, 25, 96), math.log(codec.floor)))


def test_a_tone_survives_the_round_trip():
    waveform = tone(440.0)
    frames = SpectralCodec(torch.zeros(1, 1, 96)).log_mel(waveform)[0]
    codec = SpectralCodec(torch.stack([frames, torch.zeros_like(frames)]))  # every frame is an entry: no coding loss
    decoded = codec.decode_codes(codec.encode(waveform))
    assert decoded.shape == (1, 16000) and decoded.dtype == torch.float32 and decoded.abs().max() <= 1
    spectrum = torch.fft.rfft(decoded[0] * torch.hann_window(16000)).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 8  # Hz; a mel band is 24 Hz wide there
    assert abs(float(decoded.square().mean().sqrt() / waveform.square().mean().sqrt()) - 1) < 0.2


@pytest.mark.parametrize(("size", "hop", "count"), [(8, 3, 5), (6, 2, 4), (5, 4, 3), (7, 6, 1)])
def test_overlap_add_sums_shifted_frames(size, hop, count):
    frames = torch.randn(2, count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(2, (count - 1) * hop + size, dtype=torch.float64)
    for number in range(count):
        total[:, number * hop : number * hop + size] += frames[:, number]
    torch.testing.assert_close(overlap_add(frames, hop), total)


@pytest.mark.parametrize(("n_fft", "hop"), [(2048, 640), (512, 128), (256, 100), (64, 63)])
@pytest.mark.parametrize("iterations", [0, 2])
def test_decoding_is_griffin_lim_with_the_transforms_of_torch(n_fft, hop, iterations):
    mels = n_fft // 16
    codec = SpectralCodec(torch.randn(1, C, mels, generator=torch.Generator().manual_seed(0)), 0, 16000, n_fft, hop)
    codes = torch.arange(12).view(2, 6, 1) % C
    window, start = codec.window.double(), torch.rand(n_fft // 2 + 1, 1, generator=torch.Generator().manual_seed(0))
    mel = (codec.decode_log_mel(codes).exp() - codec.floor).clamp(min=0)
    magnitude = (mel @ codec.mel_inverse).clamp(min=0).mT[..., [0, 1, 2, 3, 4, 5, 5]].double()
    turns = start + torch.arange(n_fft // 2 + 1)[:, None] * torch.arange(7) * (hop / n_fft)
    angles, previous = torch.polar(torch.ones_like(magnitude), 2 * math.pi * turns.double().expand_as(magnitude)), 0
    for number in range(iterations + 1):
        expected = torch.istft(magnitude * angles, n_fft, hop, window=window, length=6 * hop)
        if number < iterations:
            rebuilt = torch.stft(expected, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
            angles = torch.sgn(rebuilt - previous * (0.99 / 1.99))
            previous = rebuilt
    torch.testing.assert_close(codec.decode_codes(codes, iterations), expected.float().clamp(-1, 1), atol=1e-3, rtol=0)


def test_decoding_is_deterministic_and_the_same_in_a_batch(codec):
    codes = torch.randint(0, C, (3, 30, K), generator=torch.Generator().manual_seed(1))
    waveforms = codec.decode_codes(codes)
    torch.testing.assert_close(codec.decode_codes(codes[1:2])[0], waveforms[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode_codes(codes), waveforms)


def test_token_ids_by_hand(codec):
    assert codec.to_token_ids(torch.tensor([[0, 1], [7, 0]])) == [5, 5 + 8 + 1, 5 + 7, 5 + 8]


def test_tokens_out_of_turn_are_skipped(codec):
    codes = torch.tensor([[0, 1], [7, 0], [3, 2]])
    clean = codec.to_token_ids(codes)
    torch.testing.assert_close(codec.to_codes(clean), codes)
    word, end = 5 + K * C, 2
    # a word, a code of the first codebook in the second one's turn, and the end token change nothing
    torch.testing.assert_close(codec.to_codes([word, clean[0], 5 + 4, *clean[1:], end]), codes)
    torch.testing.assert_close(codec.to_codes(clean[:-1]), codes[:2])  # the last frame is not complete
    assert codec.to_codes([1, 2, word]).shape == (0, K)


def test_drafts_of_beginnings_hear_nothing_of_what_follows(codec):
    """The same beginnings of streams that go on in other ways sound the same, bit for bit, and nearly like decoded."""
    generator = torch.Generator().manual_seed(0)
    first, *rest = torch.randint(0, C, (3, 12, K), generator=generator)
    streams = [codec.to_token_ids(torch.cat([first, end])) for end in rest] + [[], codec.to_token_ids(first[:1])]
    lengths = [5 * K, 12 * K - 1, 12 * K]
    parts = codec.draft(streams, lengths)
    assert [len(part) for part in parts] == [4, 4, 4]
    for length, ((one, rate), (other, _), (empty, _), (short, _)) in zip(lengths, parts, strict=True):
        assert rate == codec.sampling_rate and torch.equal(one, other)
        assert len(one) == length // K * codec.hop_length - codec.n_fft // 2
        assert len(empty) == len(short) == codec.hop_length and not empty.any() and not short.any()
    assert not torch.equal(*(codec.draft(streams[:2], [14 * K])[0][i][0] for i in (0, 1)))
    whole = codec.decode_codes(first[None], iterations=0)[0]
    torch.testing.assert_close(parts[2][0][0], whole[: len(parts[2][0][0])], atol=1e-6, rtol=0)


def test_drafts_are_embedded_nearly_as_what_is_decoded():
    """The shipped codec and embedder: a draft of a melody's beginning is nearer to it than another melody is."""
    models = Path(__file__).parents[1] / "recipes/tiny_music/models"
    codec = SpectralCodec.from_pretrained(models / "codec")
    embed = MusicEmbedder.from_pretrained(models / "embedder")
    melodies = [torch.cat([tone(f, 0.5) for f in notes]) for notes in ((220, 277, 330, 440), (660, 880, 1320, 990))]
    streams = [codec.to_token_ids(codec.encode(melody)[0]) for melody in melodies]
    drafts = embed(codec.draft(streams, [60])[0])
    decoded = embed(codec.decode([stream[:60] for stream in streams]))
    cosines = drafts @ decoded.T
    assert cosines.diagonal().min() > 0.9 and cosines.diagonal().min() > cosines.fill_diagonal_(-1).max() + 0.05


def test_decode_gives_one_waveform_per_stream_in_order(codec):
    streams = [codec.to_token_ids(torch.randint(0, C, (frames, K))) for frames in (4, 6, 4)]
    waveforms = codec.decode([streams[0], [], streams[1], streams[2]])
    assert [len(w) for w, _ in waveforms] == [4 * 640, 640, 6 * 640, 4 * 640]
    assert all(rate == 16000 and w.dim() == 1 and w.dtype == torch.float32 for w, rate in waveforms)
    assert not waveforms[1][0].any()
    torch.testing.assert_close(
        waveforms[2][0], codec.decode_codes(codec.to_codes(streams[1])[None])[0], atol=1e-4, rtol=0
    )


def test_files(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "codec.safetensors"}
    again = SpectralCodec.from_pretrained(tmp_path)
    torch.testing.assert_close(again.codebooks, codec.codebooks)
    codes = torch.randint(0, C, (1, 5, K))
    torch.testing.assert_close(again.decode_codes(codes), codec.decode_codes(codes))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a spectral codec"):
        SpectralCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 2), "got \\(3, 2\\)"),
        (torch.zeros(1, 3, 3), "got \\(1, 3, 3\\)"),
        (torch.full((1, 3, 2), C), "must be in 0..7, got 8..8"),
    ],
)
def test_bad_codes_are_refused(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode_codes(codes)


@pytest.mark.parametrize(
    ("n_fft", "hop", "message"),
    [
        (640, 640, "`hop_length=640`; it must be less than `n_fft`, 640"),  # gaps between the windows
        (255, 100, "`n_fft=255`; it must be even"),
    ],
)
def test_bad_windows_are_refused(n_fft, hop, message):
    with pytest.raises(ValueError, match=message):
        SpectralCodec(torch.zeros(1, 1, 16), n_fft=n_fft, hop_length=hop)


def test_bad_waveform_is_refused(codec):
    with pytest.raises(ValueError, match="samples, got 100"):
        codec.encode(torch.zeros(100))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sound_that_is_not_finite_is_not_written(value):
    with pytest.raises(ValueError, match="`waveform` has samples that are NaN or infinite"):
        wav_bytes(torch.tensor([0.0, value]), 8000)
