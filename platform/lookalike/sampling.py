"""Inverse-square-root resampling: how often an image is seen in an epoch (Pinterest section 4.6; Mahajan et al. 2018).

Shared by the shards, which store the expected number of copies, and by training, which draws whole numbers from it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lookalike.seeds import derive_seed

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def label_repeats(frequency: NDArray[np.floating], threshold: float) -> NDArray[np.float64]:
    """r(h) = max(1, sqrt(t / f(h))) for label frequencies f in (0, 1], the share of images with label h.

    A label that no image has gets 1.
    """
    f = np.asarray(frequency, dtype=np.float64)
    return np.where(f > 0, np.maximum(1.0, np.sqrt(threshold / np.where(f > 0, f, 1.0))), 1.0)


def image_repeat(labels: Sequence[int], repeats: NDArray[np.floating]) -> float:
    """r(I) = the largest r(h) over the image's labels; 1 without labels."""
    return max((float(repeats[label]) for label in labels), default=1.0)


def stable_keys(ids: Sequence[str]) -> NDArray[np.uint64]:
    """A uniform 64-bit key for each id, the same on every machine and in any order of rows."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids)
    return np.frombuffer(digests, dtype="<u8").copy()


def mix_keys(keys: NDArray[np.uint64], seed: int, *names: str | int) -> NDArray[np.uint64]:
    """Independent uniform 64-bit numbers from ``keys`` for the choice called ``names`` (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(derive_seed(seed, *names)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def round_repeats(
    repeat: NDArray[np.floating], keys: NDArray[np.uint64], *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Copies of each image in ``epoch``: floor(r), plus one with probability r - floor(r).

    ``repeat`` [n] is r(I) >= 0, ``keys`` [n] comes from :func:`stable_keys`. The draw depends only on image, seed and
    epoch, so workers agree without communication and a resumed epoch is the same.
    """
    r = np.asarray(repeat, dtype=np.float64)
    unit = (mix_keys(keys, seed, "repeat", epoch) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    whole = np.floor(r)
    return (whole + (unit < r - whole)).astype(np.int64)
