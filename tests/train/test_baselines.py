"""What prefixes are compared with: SVD against scikit-learn, and the order of truncation and normalisation."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from lookalike.train.baselines import normalize_prefix, project, svd_directions


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
