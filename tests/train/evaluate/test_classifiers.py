"""Classifiers and adaptive classification, against scikit-learn and loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid

from lookalike.train.evaluate import adaptive
from lookalike.train.evaluate.classifiers import (
    calibration_error,
    is_among_best,
    nearest_class_mean,
    ridge,
    softmax,
    softmax_regression,
)


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    y = random.integers(0, 4, 300)
    centres = random.normal(size=(4, 10))
    return (centres[y] + 1.5 * random.normal(size=(300, 10))).astype(np.float32), y


def test_class_means_are_scikit_learns(rows: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = rows
    found = nearest_class_mean(x[:200], y[:200], 5).scores(x[200:])
    assert np.array_equal(found.argmax(axis=1), NearestCentroid().fit(x[:200], y[:200]).predict(x[200:]))
    assert np.isneginf(found[:, 4]).all()  # a class without a row


def test_ridge_is_scikit_learns_for_every_penalty(rows: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = rows
    penalties = (1e-6, 0.1, 10.0)
    for penalty, fit in zip(penalties, ridge(x, y, 4, penalties), strict=True):
        oracle = Ridge(alpha=penalty * len(x)).fit(x.astype(np.float64), np.eye(4)[y])
        np.testing.assert_allclose(fit.weight, oracle.coef_.T, atol=1e-9)
        np.testing.assert_allclose(fit.bias, oracle.intercept_, atol=1e-9)


def test_ridge_takes_more_features_than_rows_and_constant_features() -> None:
    random = np.random.default_rng(0)
    x = np.hstack([random.normal(size=(20, 60)), np.ones((20, 3))]).astype(np.float32)
    (fit,) = ridge(x, np.arange(20) % 2, 2, [1e-3])
    assert np.isfinite(fit.weight).all()
    assert (fit.scores(x).argmax(axis=1) == np.arange(20) % 2).all()


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_softmax_regression_is_scikit_learns(rows: tuple[np.ndarray, np.ndarray], penalty: float) -> None:
    x, y = rows
    fit = softmax_regression(x, y, 4, penalty)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=5000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(softmax(fit.scores(x)), oracle.predict_proba(x), atol=2e-4)


@given(st.integers(1, 6), st.integers(0, 99))
def test_the_best_classes_are_those_of_a_stable_sort(k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, y = random.integers(0, 3, (20, 5)).astype(float), random.integers(0, 5, 20)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert np.array_equal(is_among_best(scores, y, k), (order == y[:, None]).any(axis=1))


def test_calibration_error_is_that_of_a_loop_over_bins() -> None:
    random = np.random.default_rng(1)
    confidence = np.append(random.uniform(0, 1, 200), [0.0, 0.2, 1.0])
    correct = random.uniform(size=203) < confidence
    expected = 0.0
    for low in np.linspace(0, 1, 16)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / 15) | ((low == 0) & (confidence == 0))
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct) == pytest.approx(expected)


def probabilities(seed: int, num: int = 60) -> tuple[list[np.ndarray], np.ndarray]:
    """Three dims, each surer and more often right than the one before."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, num)
    return [softmax(sharp * (np.eye(3)[y] + random.normal(size=(num, 3)))) for sharp in (1.0, 2.0, 4.0)], y


@given(st.integers(0, 200))
def test_thresholds_are_the_smallest_of_the_best_pairs(seed: int) -> None:
    held, y = probabilities(seed)
    found = adaptive.learn_thresholds(held, y)
    assert len(found) == 2
    for number, threshold in enumerate(found):
        own, following = held[number], held[number + 1]

        def accuracy(t: float, own: np.ndarray = own, following: np.ndarray = following) -> float:
            return float(
                np.mean([(a if a.max() > t else b).argmax() == c for a, b, c in zip(own, following, y, strict=True)])
            )

        tried = [(accuracy(t), -t) for t in np.linspace(0.1, 1, 100)]
        assert -max(tried)[1] == threshold


@given(st.integers(0, 200), st.lists(st.floats(0.2, 1.0), min_size=2, max_size=2))
def test_a_cascade_stops_where_a_loop_stops(seed: int, thresholds: list[float]) -> None:
    test, _ = probabilities(seed)
    cascade = adaptive.apply_thresholds(test, thresholds)
    tried, stopped = [], []
    for row in range(60):
        number = next((n for n in (0, 1) if test[n][row].max() > thresholds[n]), 2)
        assert (cascade.stops[row], cascade.answers[row]) == (number, test[number][row].argmax())
        stopped.append((8, 16, 32)[number])
        tried.append(sum((8, 16, 32)[: number + 1]))
    assert adaptive.expected_dims(cascade.stops, (8, 16, 32)) == (np.mean(stopped), np.mean(tried))


def test_the_bounds_of_routing() -> None:
    sure = [np.array(p, float) for p in ([[1, 0], [1, 0], [0, 1]], [[0, 1], [1, 0], [0, 1]], [[0, 1], [0, 1], [0, 1]])]
    assert adaptive.oracle(sure, np.array([1, 1, 0])).tolist() == [1, 2, -1]
    assert adaptive.majority(sure).tolist() == [1, 0, 1]
    assert adaptive.majority([sure[0][:1], sure[1][:1]]).tolist() == [1]  # one vote each: the larger dim's


def test_the_papers_expected_dims_count_one_way() -> None:
    """Appendix D.1: 37 counts the last dim, 62 all that were tried; the same stops give both."""
    stops = np.repeat([0, 1, 2, 3], [400, 300, 200, 100])
    last, tried = adaptive.expected_dims(stops, (8, 16, 32, 64))
    assert (last, tried) == (0.4 * 8 + 0.3 * 16 + 0.2 * 32 + 0.1 * 64, 0.4 * 8 + 0.3 * 24 + 0.2 * 56 + 0.1 * 120)
