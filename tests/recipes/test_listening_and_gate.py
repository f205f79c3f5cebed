"""The measuring parts of `recipes/tiny_music/`: what decides whether the gate passes, and which half is whose."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny_music" / "build"))
pytest.importorskip("tqdm")

import gate
import listening
from captions import full_caption

RATE = 16000


def tone(frequency: float, samples: int = RATE) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(samples) / RATE)


@pytest.mark.parametrize(
    ("prompt", "instrument", "tempo", "kind"),
    [
        ("a calm Bach chorale in G minor for pipe organ", "church organ", "slow", "chorale"),
        ("guitar playing a quick slip jig", "acoustic guitar", "fast", "slip jig"),
        ("a tune at a steady tempo in A major", None, "medium", None),
        ("Fiddle playing an Irish air", "violin", None, "air"),
    ],
)
def test_what_a_prompt_names(prompt, instrument, tempo, kind):
    assert (gate.named(prompt, "instrument"), gate.named(prompt, "tempo"), gate.named(prompt, "kind")) == (
        instrument,
        tempo,
        kind,
    )


def test_every_full_caption_names_its_labels():
    for instrument in gate.VALUES["instrument"]:
        for tempo in gate.VALUES["tempo"]:
            for kind in gate.VALUES["kind"]:
                row = {"instrument": instrument, "tempo": tempo, "kind": kind, "key": "G minor"}
                assert {name: gate.named(full_caption(row), name) for name in gate.VALUES} == {
                    name: row[name] for name in gate.VALUES
                }


def test_pitch_hold():
    assert gate.pitch_hold(tone(440)) == 1.0
    notes = torch.cat([tone(frequency, RATE // 2) for frequency in (300, 400)])
    assert 0.9 < gate.pitch_hold(notes) < 1.0
    assert gate.pitch_hold(torch.randn(RATE, generator=torch.Generator().manual_seed(0))) < 0.3
    assert np.isnan(gate.pitch_hold(torch.zeros(640)))


def test_accuracy_and_chance():
    wanted, heard = ["a", "a", None, "b"], ["a", "b", "a", "b"]
    np.testing.assert_equal(gate.accuracy(wanted, heard), [1.0, 0.0, np.nan, 1.0])
    # Of those that want something: 2/3 want a, 1/3 hears a; 1/3 wants b, 2/3 hear b.
    assert gate.chance(wanted, heard) == pytest.approx(2 / 9 + 2 / 9)
    assert gate.chance(["a", "b"], ["a", "a"]) == 0.5  # a judge that always says the same


def test_bootstrap_interval():
    draws = np.random.default_rng(0).integers(0, 100, (2000, 100))
    values = np.random.default_rng(1).normal(size=100)
    interval = gate.bootstrap(values, draws)
    assert interval["mean"] == pytest.approx(values.mean())
    # Close to mean -+ 1.96 standard errors.
    half = 1.96 * values.std() / 10
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.03)
    with_gaps = np.where(np.arange(100) < 50, np.nan, values)
    assert gate.bootstrap(with_gaps, draws)["mean"] == pytest.approx(values[50:].mean())


def test_verdict():
    def around(mean: float) -> dict:
        return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}

    one = {"instrument": around(0.5), "tempo": around(0.5), "adherence": around(0.3), "diversity": around(0.3)}
    three = one | {"adherence": around(0.4), "diversity": around(0.2)}
    difference = {"adherence": around(0.1), "diversity": around(-0.1)}
    chances = {"instrument": 0.1, "tempo": 0.33}
    assert all(gate.verdict({"1": one, "3": three}, difference, chances, "1", "3").values())
    checks = gate.verdict(
        {"1": one, "3": one}, {name: around(0.0) for name in difference}, {**chances, "tempo": 0.4}, "1", "3"
    )
    assert [name for name, holds in checks.items() if holds] == ["instrument_above_chance"]


def test_halves_split_by_tune():
    rows = [{"family": index // 2} for index in range(400)]
    halves = [listening.half_of(row) for row in rows]
    assert halves[::2] == halves[1::2]
    assert 150 < sum(halves) < 250
