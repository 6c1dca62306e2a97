"""What prefixes are compared with: SVD against scikit-learn, random choice and projection by what defines them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from lookalike.train.evaluate.baselines import REDUCTIONS, normalize_prefix, project, svd_directions


def vectors(n: int, dim: int) -> np.ndarray:
    return (np.random.default_rng(5).normal(size=(n, dim)) * np.linspace(2, 0.1, dim) + 0.3).astype(np.float32)


def test_svd_is_that_of_scikit_learn_up_to_sign() -> None:
    train, other = vectors(300, 20), vectors(50, 20)[::-1].copy()
    ours = project(other, svd_directions(train))
    oracle = TruncatedSVD(10, algorithm="arpack", random_state=0).fit(normalize(train.astype(np.float64)))
    theirs = oracle.transform(normalize(other.astype(np.float64)))
    signs = np.sign((ours[:, :10] * theirs).sum(axis=0))
    assert np.allclose(ours[:, :10] * signs, theirs, atol=1e-4)
    assert ours.shape == (50, 20)
    assert np.allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)  # a rotation of unit vectors


def test_fewer_rows_than_dimensions_give_fewer_directions() -> None:
    assert svd_directions(vectors(6, 20)).shape == (6, 20)


@given(st.integers(1, 20))
def test_prefixes_are_normalised_after_truncation(dim: int) -> None:
    data = vectors(10, 20)
    assert np.allclose(normalize_prefix(data, dim), normalize(data[:, :dim]), atol=1e-6)


def test_a_zero_prefix_stays_zero() -> None:
    data = vectors(3, 6)
    data[1, :2] = 0.0
    assert normalize_prefix(data, 2)[1].tolist() == [0.0, 0.0]


def test_a_random_choice_takes_different_features_each_as_often() -> None:
    data = vectors(4, 20)
    first = []
    for seed in range(300):
        chosen = REDUCTIONS["random"](data, data[:0], seed)
        places = [int(np.flatnonzero((data == column[:, None]).all(axis=0))[0]) for column in chosen.T]
        assert sorted(places) == list(range(20))  # columns of the input, none twice
        first += places[:5]
    assert stats.chisquare(np.bincount(first, minlength=20)).pvalue > 1e-3  # m = 5: not biased to the first features
    again = REDUCTIONS["random"](data, data[:0], 3)
    assert np.array_equal(again, REDUCTIONS["random"](data, data[:0], 3))
    assert not np.array_equal(again, REDUCTIONS["random"](data, data[:0], 4))


def test_a_random_projection_is_linear_gaussian_and_keeps_cosines_on_average() -> None:
    data = vectors(200, 30)
    unit = normalize(data.astype(np.float64))
    projected = REDUCTIONS["jl"](data, data[:0], 7)
    matrix, residuals, rank, _ = np.linalg.lstsq(unit, projected.astype(np.float64), rcond=None)
    assert rank == 30
    assert residuals.max() < 1e-6  # the same matrix for every row
    assert stats.kstest(matrix.reshape(-1), "norm").pvalue > 1e-3
    cosine = float(unit[0] @ unit[1])
    estimates = []
    for seed in range(200):
        pair = normalize_prefix(REDUCTIONS["jl"](data[:2], data[:0], seed), 15)
        estimates.append(float(pair[0] @ pair[1]))
    assert abs(np.mean(estimates) - cosine) < 4 * np.std(estimates) / np.sqrt(200) + 0.02  # normalising biases a little
    assert np.std(estimates) > 0.01
