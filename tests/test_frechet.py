"""The Fréchet distance against known values, and what is said of its bias."""

import numpy as np
import pytest

from trl_drcd.evaluation.frechet import Reference, frechet_distance, frechet_to_reference


def test_of_known_normals():
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0)
    assert frechet_distance(np.zeros(3), eye, np.array([1.0, 2.0, 2.0]), eye) == pytest.approx(9)
    # Diagonal covariances: sum of (sigma_1 - sigma_2)^2
    assert frechet_distance(np.zeros(3), 4 * eye, np.zeros(3), 9 * eye) == pytest.approx(3)


def test_agrees_with_the_matrix_square_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    (a, b) = (generator.normal(size=(40, 6)) @ generator.normal(size=(6, 6)) for _ in range(2))
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    (m1, c1), (m2, c2) = moments
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(expected)
    reference = Reference.of(b, "x")
    assert frechet_to_reference(a, 4, reference)["frechet"]["mean"] == pytest.approx(expected)


def test_the_floor_is_the_bias_and_the_interval_is_moved_back():
    generator = np.random.default_rng(0)
    reference = Reference(np.zeros(8), np.eye(8), 1000, "x")
    found = [frechet_to_reference(generator.normal(size=(64, 8)), 2, reference) for _ in range(20)]
    # Independent draws of the reference: all that they score is bias, and the floor says how much
    scored = np.mean([one["frechet"]["mean"] for one in found])
    floor = np.mean([one["frechet_floor"]["mean"] for one in found])
    assert scored == pytest.approx(floor, rel=0.1) and floor > 0.2
    assert all(one["frechet"]["low"] < one["frechet"]["mean"] < one["frechet"]["high"] for one in found)
    more = frechet_to_reference(generator.normal(size=(1024, 8)), 2, reference)
    assert more["frechet_floor"]["mean"] < floor / 10


def test_a_reference_of_another_judge_is_refused(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(30, 4))
    reference = Reference.of(embeddings, "0123")
    reference.save(tmp_path / "r.safetensors")
    loaded = Reference.load(tmp_path / "r.safetensors", "0123")
    np.testing.assert_allclose(loaded.covariance, np.cov(embeddings.T), rtol=1e-5)
    assert (loaded.clips, loaded.judge) == (30, "0123")
    with pytest.raises(ValueError, match=r"made with the judge 0123, but `judge` is 4567 .*; make it again"):
        Reference.load(tmp_path / "r.safetensors", "4567")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        Reference.load(tmp_path / "none", "0123")
    with pytest.raises(ValueError, match="have 3 dimensions, the reference has 4"):
        frechet_to_reference(embeddings[:, :3], 2, loaded)
