"""The untrained second embedder: each descriptor against what the signal is known to hold."""

import pytest
import torch

from trl_drcd.audio import MusicDescriptors
from trl_drcd.audio.descriptors import intervals

RATE = 16000


def tune(midi: list[int], seconds: float = 0.25, harmonics: int = 4) -> torch.Tensor:
    """Notes one after the other, each `seconds` long, fading."""
    time = torch.arange(int(seconds * RATE)) / RATE
    notes = []
    for pitch in midi:
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        partials = [torch.sin(2 * torch.pi * frequency * k * time) / k for k in range(1, harmonics + 1)]
        notes.append(sum(partials) * torch.exp(-4 * time))
    return 0.2 * torch.cat(notes)


SCALE = [60, 62, 64, 65, 67, 69, 71, 72, 71, 69, 67, 65, 64, 62, 60, 62]


@pytest.fixture(scope="module")
def embedder() -> MusicDescriptors:
    return MusicDescriptors()


def blocks(embedder: MusicDescriptors, waveform: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return embedder.descriptors([(waveform, RATE)])[0].split(embedder.block_sizes)


def test_chroma_names_the_pitch_class(embedder):
    harmony = blocks(embedder, tune([69] * 16, harmonics=1))[1]
    assert harmony[:12].argmax() == 9  # A
    assert harmony[9] > 0.9


def test_intervals_follow_the_notes():
    chroma = torch.eye(12)[torch.tensor([0, 4, 7, 11])]  # C, E, G, B
    expected = torch.zeros(12)
    expected[4], expected[3] = 2 / 3, 1 / 3  # two major thirds, one minor
    torch.testing.assert_close(intervals(chroma, 1), expected)


def test_transposition_changes_the_key_and_not_the_intervals(embedder):
    low, high = (blocks(embedder, tune([pitch + by for pitch in SCALE], harmonics=1))[1] for by in (0, 5))
    torch.testing.assert_close(low[:12].roll(5), high[:12], atol=0.05, rtol=0)
    assert (low[:12] - high[:12]).abs().max() > 0.1
    torch.testing.assert_close(low[12:], high[12:], atol=0.05, rtol=0)


def test_rhythm_peaks_at_the_distance_of_the_notes(embedder):
    seconds = torch.tensor(embedder.rhythm_lags) * embedder.hop_length / RATE
    rhythm = blocks(embedder, tune(SCALE, seconds=0.5))[2]
    between = (seconds > 0.2) & (seconds < 0.75)
    assert abs(seconds[between][rhythm[between].argmax()] - 0.5) < 0.04


def test_timbre_hears_the_overtones(embedder):
    plain, rich = (blocks(embedder, tune(SCALE, harmonics=count))[0] for count in (1, 8))
    again = blocks(embedder, tune(SCALE[::-1], harmonics=1))[0]
    assert (plain - rich).norm() > 5 * (plain - again).norm()


def test_fit_standardises_and_embeddings_have_length_1(embedder, tmp_path):
    audio = [(tune([p + i for p in SCALE], 0.2 + 0.02 * i, 1 + i), RATE) for i in range(6)]
    fitted = MusicDescriptors().fit(audio)
    standard = (fitted.descriptors(audio) - fitted.mean) / fitted.std
    torch.testing.assert_close(standard.mean(0), torch.zeros(standard.shape[1]), atol=1e-4, rtol=0)
    embeddings = fitted(audio)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    fitted.save_pretrained(tmp_path)
    assert torch.equal(MusicDescriptors.from_pretrained(tmp_path)(audio), embeddings)


def test_blocks_are_the_parts_of_the_embedding_each_of_length_1(embedder):
    audio = [(tune(SCALE), RATE), (tune(SCALE[::-1], harmonics=8), RATE)]
    parts = embedder.blocks(audio)
    assert list(parts) == ["timbre", "harmony", "rhythm"]
    whole = embedder(audio).split(embedder.block_sizes, dim=-1)
    for part, of_whole in zip(parts.values(), whole, strict=True):
        torch.testing.assert_close(part, torch.nn.functional.normalize(of_whole, dim=-1))
    assert {name: part.shape[0] for name, part in embedder.blocks([]).items()} == {
        "timbre": 0,
        "harmony": 0,
        "rhythm": 0,
    }


def test_the_recipes_embedders_hear_timbre_and_harmony_apart():
    from recipes.music.diversities import harmony, timbre

    plain = (tune(SCALE, harmonics=1), RATE)
    rich, moved = (tune(SCALE, harmonics=8), RATE), (tune([p + 6 for p in SCALE], harmonics=1), RATE)

    def distances(embed):
        first, *others = embed([plain, rich, moved])
        return [float(1 - first @ other) for other in others]

    timbre_rich, timbre_moved = distances(timbre)
    harmony_rich, harmony_moved = distances(harmony)
    assert timbre_rich > 1.3 * timbre_moved
    assert harmony_moved > 2 * harmony_rich


def test_silence_short_clips_rates_and_loudness(embedder):
    empty, silent, short = embedder([(torch.zeros(0), RATE), (torch.zeros(8000), RATE), (tune([69]), RATE)])
    assert torch.equal(empty, silent) and torch.isfinite(short).all()
    loud, quiet = embedder([(tune(SCALE), RATE), (0.01 * tune(SCALE), RATE)])
    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)
    assert embedder([]).shape == (0, sum(embedder.block_sizes))
    with pytest.raises(ValueError, match="average the channels"):
        embedder([(torch.zeros(2, 100), RATE)])
    with pytest.raises(ValueError, match="at least 2 clips"):
        embedder.fit([(tune(SCALE), RATE)])
