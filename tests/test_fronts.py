"""Fronts against brute force and against a library."""

import numpy as np
import pytest

from trl_drcd.evaluation import hypervolume, pareto_front
from trl_drcd.evaluation.fronts import above_diagonal, curve_difference, front_difference, hypervolumes
from trl_drcd.evaluation.statistics import Resampling


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


def test_areas_of_many_fronts_are_those_of_each():
    points = np.random.default_rng(0).normal(size=(50, 7, 2))
    moocore = pytest.importorskip("moocore")
    expected = [moocore.hypervolume(front, ref=[-0.5, -0.5], maximise=True) for front in points]
    np.testing.assert_allclose(hypervolumes(points, [-0.5, -0.5]), expected)


def test_front_difference():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(3, 50, 2)) * 0.2
    theirs = draws(np.array([[1, 3], [2, 2], [3, 1]])[:, None] + noise)
    better = Resampling(50).interval(front_difference(theirs + 0.3, theirs, [0, 0]))
    assert better["low"] > 0 and better["low"] <= better["mean"] <= better["high"]
    assert (front_difference(theirs, theirs, [0, 0]) == 0).all()
    with pytest.raises(ValueError, match=r"got \(3, 2001, 2\), \(3, 2000, 2\)"):
        front_difference(theirs, theirs[:, 1:], [0, 0])


def draws(points: np.ndarray) -> np.ndarray:
    """Points on each prompt `(n, P, 2)` as means with their draws."""
    resampling = Resampling(points.shape[1])
    return np.array([np.stack([resampling.means(point[None, :, i]) for i in (0, 1)], -1) for point in points])


def test_the_interval_of_a_front_difference_covers():
    # One point each, so that the areas are products of means; the truth is (1.1 - 1.0) * 1 = 0.1
    generator, hits = np.random.default_rng(1), 0
    for _ in range(100):
        quality = np.stack([1.1, 1.0])[:, None] + generator.normal(size=(2, 40)) * 0.3
        points = np.stack([np.ones_like(quality), quality], -1)[:, None]
        interval = Resampling(40).interval(front_difference(*(draws(point) for point in points), [0, 0]))
        hits += interval["low"] <= 0.1 <= interval["high"]
    assert 88 <= hits <= 99  # 95 expected


def test_curve_difference_is_numpys_of_each_draw():
    ours, theirs = np.random.default_rng(0).random((2, 5, 40, 2))
    for draw, found in enumerate(curve_difference(ours, theirs)):
        lines = []
        for points in (ours[:, draw], theirs[:, draw]):
            x = np.sort(points[:, 0])
            lines.append((x, [points[points[:, 0] >= one, 1].max() for one in x]))
        at = np.linspace(max(line[0][0] for line in lines), min(line[0][-1] for line in lines), 33)
        expected = np.interp(at, *lines[0]).mean() - np.interp(at, *lines[1]).mean()
        assert found == pytest.approx(expected) if at[0] <= at[-1] else np.isnan(found)


def test_curve_difference_by_hand():
    line = np.array([[[0.0, 2.0]], [[1.0, 1.0]], [[2.0, 0.0]]])
    point = np.array([[[0.5, 1.0]]])
    np.testing.assert_allclose(curve_difference(line, point), [0.5])
    np.testing.assert_allclose(curve_difference(point, line), [-0.5])
    np.testing.assert_allclose(curve_difference(line + np.array([0, 0.25]), line), [0.25])
    assert np.isnan(curve_difference(line, point + 5)).all()  # no diversity in common
    # A curve that turns back: at diversity 0 its point of diversity 1 and quality 1 counts
    turning = np.array([[[0.0, 0.0]], [[1.0, 1.0]]])
    np.testing.assert_allclose(curve_difference(turning, np.array([[[0.0, 0.4]]])), [0.6])


def test_above_the_diagonal():
    curve = np.array([[0.0, 2.0], [3.0, 2.0], [2.0, 4.0]])
    np.testing.assert_allclose(above_diagonal(curve, [0, 0.5, 1]), [[0, 0], [2, -1], [0, 0]])
    with pytest.raises(ValueError, match="increase from 0 to 1"):
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
