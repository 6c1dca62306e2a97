import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.sampling import image_repeat, label_repeats, round_repeats, stable_keys


def test_inverse_square_root_resampling_formula() -> None:
    """r(h) = max(1, sqrt(t / f(h))); r(I) is the largest over the image's labels."""
    repeats = label_repeats(np.array([0.04, 0.01, 0.0025, 0.0]), threshold=0.01)
    assert repeats.tolist() == [1.0, 1.0, 2.0, 1.0]
    assert image_repeat([0, 2], repeats) == 2.0
    assert image_repeat([], repeats) == 1.0


def test_rounding_keeps_the_mean_and_the_bounds() -> None:
    keys = stable_keys([f"image-{i}" for i in range(20_000)])
    for value in (1.0, 1.3, 2.75):
        copies = round_repeats(np.full(len(keys), value), keys, seed=3, epoch=1)
        assert set(np.unique(copies)) <= {int(np.floor(value)), int(np.ceil(value))}
        assert copies.mean() == pytest.approx(value, abs=0.015)


def test_rounding_changes_with_the_epoch_and_not_with_the_order() -> None:
    keys, repeat = stable_keys([f"i{n}" for n in range(500)]), np.full(500, 1.5)
    first, second = (round_repeats(repeat, keys, seed=3, epoch=e) for e in (0, 1))
    assert (first != second).any()
    order = np.random.default_rng(0).permutation(500)
    assert (round_repeats(repeat, keys[order], seed=3, epoch=0) == first[order]).all()


@given(st.lists(st.text(max_size=12), max_size=20))
def test_keys_depend_on_the_id_alone(ids: list[str]) -> None:
    keys = stable_keys(ids)
    assert keys.dtype == np.uint64
    assert all(stable_keys([text])[0] == key for text, key in zip(ids, keys, strict=True))
