"""The trade of adherence for diversity of an ideal policy, against enumeration."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.ideal_trade import main, trade_moments, trades
from trl_drcd.diversity import pairwise_cosine_distance


def draws(count, seed=0):
    """Distances and adherence of samples of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    embeddings[:, 0] += 1
    adherence = torch.randn(count, generator=generator, dtype=torch.float64) + embeddings[:, 0]
    return pairwise_cosine_distance(embeddings, count)[0].numpy(), adherence.numpy()


def test_moments_are_means_over_all_choices_of_different_samples():
    d, a = draws(6)
    four = list(permutations(range(6), 4))
    joined = np.mean([d[i, j] * d[i, k] for i, j, k, _ in four])
    apart = np.mean([d[i, j] * d[k, m] for i, j, k, m in four])
    covariance = np.mean([a[i] * d[i, j] for i, j, *_ in four]) - np.mean([a[i] * d[j, k] for i, j, k, _ in four])
    expected = [np.mean([d[i, j] for i, j, *_ in four]), a.mean(), joined - apart, covariance]
    assert trade_moments(d, a) == pytest.approx(expected, abs=1e-12)


def test_moments_are_unbiased():
    """Over all samples of four from a distribution on five completions."""
    d, a = draws(5, seed=1)
    p = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    groups = np.stack(np.meshgrid(*[np.arange(5)] * 4, indexing="ij"), -1).reshape(-1, 4)
    mean = sum(p[g].prod() * trade_moments(d[np.ix_(g, g)], a[g]) for g in groups)
    r = d @ p
    expected = [p @ r, p @ a, p @ r**2 - (p @ r) ** 2, p @ (a * r) - (p @ a) * (p @ r)]
    assert mean == pytest.approx(expected, abs=1e-12)


def test_the_trade_is_that_of_a_small_tilt():
    d, a = draws(400, seed=2)
    moments = trade_moments(d, a)
    p, r = np.full(400, 1 / 400), d.mean(1)
    tilted = p * np.exp(1e-4 * r)
    tilted /= tilted.sum()
    slope = (tilted @ a - p @ a) / (tilted @ d @ tilted - p @ d @ p)
    base = np.array([0.9, -0.5, 1, 1])
    found = trades(np.stack([moments, moments]), np.stack([base, base]))
    assert found["ideal"]["mean"] == pytest.approx(slope, rel=0.02)
    guidance = (moments[1] + 0.5) / (moments[0] - 0.9)
    assert found["guidance"]["mean"] == pytest.approx(guidance)
    assert found["ideal - guidance"]["mean"] == pytest.approx(moments[3] / (2 * moments[2]) - guidance)


@pytest.mark.parametrize(
    ("strategies", "samples", "message"),
    [
        ("[{name: base}]", 8, "must be the base and one guidance scale, got 1 rows"),
        ("[{name: base}, {name: CFG, guidance_scale: [2, 3]}]", 8, "one guidance scale, got 3 rows"),
        ("[{name: base}, {name: CFG, guidance_scale: 3}]", 3, "`samples_per_prompt` must be at least 4, got 3"),
    ],
)
def test_bad_evaluations_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, strategies, samples, message):
    monkeypatch.setattr("recipes.ideal_trade.Worker", None)
    world = Path(__file__).parents[2] / "recipes/tiny_music"
    lines = [
        f"model: {world}/models/musiclm",
        f"dataset: {world}/data/test_prompts.jsonl",
        f"strategies: {strategies}",
    ]
    (tmp_path / "a.yaml").write_text(
        "\n".join([*lines, f"samples_per_prompt: {samples}", f"output_dir: {tmp_path}/out"])
    )
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / "a.yaml")])
