"""What the preference model is trained on, and what embeddings are measured with."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[2] / "recipes" / "tiny_music"
sys.path.append(str(FOLDER / "build"))

import measure_embedder  # noqa: E402
import train_judge  # noqa: E402
import train_preference  # noqa: E402
from scores import read_scores  # noqa: E402

RATE = 16000


def waves(seed: int = 0) -> torch.Tensor:
    time = torch.arange(RATE) / RATE
    return 0.1 * torch.sin(2 * torch.pi * torch.tensor([[220.0], [440.0], [660.0]]) * time)


@pytest.mark.parametrize("kind", train_preference.DEGRADATIONS)
def test_degradations_change_the_sound_and_keep_its_shape(kind):
    others = waves().roll(1, 0)
    worse = train_preference.degraded(waves(), others, kind, torch.Generator().manual_seed(0))
    assert worse.shape == waves().shape and torch.isfinite(worse).all()
    assert ((worse - waves()).square().mean(1) > 0.01 * waves().square().mean(1)).all()
    again = train_preference.degraded(waves(), others, kind, torch.Generator().manual_seed(0))
    assert torch.equal(worse, again)


def test_wobble_moves_the_pitch_and_not_the_level():
    worse = train_preference.degraded(waves(), waves(), "wobble", torch.Generator().manual_seed(0))
    torch.testing.assert_close(worse.square().mean(1), waves().square().mean(1), rtol=0.05, atol=0)
    spread = torch.fft.rfft(worse).abs()
    assert (spread.amax(1) < 0.7 * torch.fft.rfft(waves()).abs().amax(1)).all()


def test_unknown_degradation():
    with pytest.raises(ValueError, match="got 'echo'"):
        train_preference.degraded(waves(), waves(), "echo", torch.Generator())


def test_corrupted_codes_come_from_the_others():
    codes, others = torch.zeros(50, 100, 2, dtype=torch.long), torch.ones(50, 100, 2, dtype=torch.long)
    broken = train_preference.corrupted(codes, others, torch.Generator().manual_seed(0))
    assert (broken[..., 0] == broken[..., 1]).all()  # whole steps
    share = broken[..., 0].float().mean(1)
    assert share.min() > 0.02 and share.max() < 0.75 and 0.25 < share.mean() < 0.45


def test_auc_and_retrieval_by_hand():
    cosines = np.array([[0.9, 0.5, 0.1], [0.8, 0.4, 0.3], [0.2, 0.3, 0.7]])
    others = ~np.eye(3, dtype=bool)
    # Positives .9, .4, .7; negatives .5, .1, .8, .3, .2, .3: .9 beats 6, .4 beats 4, .7 beats 5, of 18 pairs
    assert measure_embedder.auc(cosines, others) == pytest.approx(15 / 18)
    found = measure_embedder.retrieval(cosines, (1, 2))
    assert found["retrieval_at_1"]["mean"] == pytest.approx(2 / 3) and found["retrieval_at_2"]["mean"] == 1
    interval = measure_embedder.resampled_auc(
        np.kron(cosines, np.ones((10, 10))), np.kron(others, np.ones((10, 10))) > 0
    )
    assert interval["low"] <= interval["mean"] <= interval["high"]


def test_one_thing_changes():
    scores = [s for s in read_scores(FOLDER / "data" / "scores.jsonl.gz") if s["split"] == "test"]
    from render import plan

    (row,) = plan(scores, 1, 0)
    changed = measure_embedder.changes_of(row, scores, random.Random(0))
    assert set(changed) == {"nothing", "instrument", "tempo", "key (3 semitones)", "key (1 semitone)", "tune"}
    differing = {name: {key for key in row if one[key] != row[key]} for name, one in changed.items()}
    assert differing["nothing"] == set() and differing["instrument"] == {"instrument"}
    assert differing["tempo"] == {"tempo", "seconds_per_quarter"}
    assert differing["key (1 semitone)"] == differing["key (3 semitones)"] == {"transpose"}
    assert differing["tune"] == {"score", "seconds_per_quarter", "starts"}


def test_modes_are_labels():
    assert train_judge.label_of({"key": "F# dorian"}, "mode") == "dorian"
    assert train_judge.label_of({"key": "F# dorian", "kind": "jig"}, "kind") == "jig"
