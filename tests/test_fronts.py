"""Fronts against brute force and against a library."""

import numpy as np
import pytest

from trl_drcd.evaluation import hypervolume, pareto_front
from trl_drcd.evaluation.fronts import above_diagonal, front_difference


def dominated(points: np.ndarray) -> np.ndarray:
    return np.array([any((q >= p).all() and (q > p).any() for q in points) for p in points])


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_nothing_dominates(seed):
    points = np.random.default_rng(seed).integers(0, 6, (15, 2)).astype(float)  # many ties and equal points
    front = pareto_front(points)
    assert sorted(front.tolist()) == np.flatnonzero(~dominated(points)).tolist()
    assert (np.diff(points[front, 0]) <= 0).all()


def test_front_by_hand():
    points = [[1, 3], [2, 2], [3, 1], [1, 1], [2, 2], [0, 3]]
    assert pareto_front(points).tolist() == [2, 1, 4, 0]
    assert pareto_front(np.zeros((0, 2))).tolist() == []


def test_hypervolume_by_hand():
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [0, 0]) == 6.0
    assert hypervolume([[1, 3], [2, 2], [3, 1], [1, 1]], [0, 0]) == 6.0
    assert hypervolume([[2, 2]], [1, 1.5]) == 0.5
    assert hypervolume([[2, 2], [3, 0.5]], [1, 1]) == 1.0  # the second is not above the reference
    assert hypervolume([[2, 2]], [3, 0]) == 0.0
    assert hypervolume(np.zeros((0, 2)), [0, 0]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_share_of_random_points_below(seed):
    generator = np.random.default_rng(seed)
    points, darts = generator.random((8, 2)), generator.random((40000, 2))
    hit = (darts[:, None] <= points).all(-1).any(1).mean()
    assert hypervolume(points, [0, 0]) == pytest.approx(hit, abs=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_hypervolume_agrees_with_moocore(seed):
    moocore = pytest.importorskip("moocore")
    points = np.random.default_rng(seed).normal(size=(12, 2))
    expected = moocore.hypervolume(points, ref=[-1.0, -1.0], maximise=True)
    assert hypervolume(points, [-1, -1]) == pytest.approx(expected)
    nondominated = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    assert sorted(pareto_front(points).tolist()) == np.flatnonzero(nondominated).tolist()


def test_front_difference():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(3, 50, 2)) * 0.2
    theirs = np.array([[1, 3], [2, 2], [3, 1]])[:, None] + noise
    better = front_difference(theirs + 0.3, theirs, [0, 0])
    assert better["low"] > 0 and better["low"] <= better["mean"] <= better["high"]
    same = front_difference(theirs, theirs, [0, 0])
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}
    with pytest.raises(ValueError, match=r"got \(3, 50, 2\), \(3, 49, 2\)"):
        front_difference(theirs, theirs[:, 1:], [0, 0])


def test_above_the_diagonal():
    curve = np.array([[0.0, 2.0], [3.0, 2.0], [2.0, 4.0]])
    np.testing.assert_allclose(above_diagonal(curve, [0, 0.5, 1]), [[0, 0], [2, -1], [0, 0]])
    with pytest.raises(ValueError, match="rise from 0 to 1"):
        above_diagonal(curve, [0, 1, 0.5])


@pytest.mark.parametrize(
    ("points", "message"), [([[1, 2, 3]], r"shape \(n, 2\), got \(1, 3\)"), ([[1, np.nan]], "must be finite")]
)
def test_bad_points_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(points)


def test_bad_reference_is_refused():
    with pytest.raises(ValueError, match="two finite numbers"):
        hypervolume([[1, 1]], [0])
