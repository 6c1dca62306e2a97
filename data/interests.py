"""Step 4, interest restriction: an image keeps the clusters whose interest is its own (Pinterest section 3.2.1).

A word has several senses ("jaguar": animals, transport); the picture's other words say which one is meant.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config

ASSIGNED = pa.schema([
    pa.field("image_id", pa.string(), nullable=False), pa.field("clusters", pa.list_(pa.int32())),
    pa.field("interests", pa.list_(pa.string())),
])  # fmt: skip


class RestrictionConfig(Config):
    """Interests of an image."""

    share: float = Field(0.4, ge=0, le=1)
    """An image has its best interest and those that score at least this share of it; 0 turns the restriction off."""


def image_interests(
    annotations: Mapping[str, float], probabilities: Mapping[str, NDArray[np.float32]], share: float
) -> NDArray[np.int64]:
    """Numbers of an image's interests: mean interest probability of its terms, weighted by their scores.

    ``annotations`` term -> score; ``probabilities`` term -> [interests].
    """
    known = [(score, probabilities[term]) for term, score in sorted(annotations.items()) if term in probabilities]
    if not known:
        return np.zeros(0, np.int64)
    weights = np.array([score for score, _ in known], np.float64)
    mean = weights @ np.stack([p for _, p in known]).astype(np.float64) / weights.sum()
    return np.nonzero(mean >= share * mean.max() - 1e-12)[0]


def map_clusters(terms: Sequence[str], clusters: Mapping[str, Sequence[int]]) -> list[int]:
    """Sorted cluster ids of ``terms``."""
    return sorted({cluster for term in terms for cluster in clusters.get(term, ())})


def restrict(clusters: Sequence[int], interest_of: Mapping[int, int], interests: NDArray[np.int64]) -> list[int]:
    """The ``clusters`` whose interest is among ``interests``."""
    allowed = set(interests.tolist())
    return [cluster for cluster in clusters if interest_of[cluster] in allowed]
