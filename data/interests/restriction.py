"""Interests of images, and the clusters that agree with them (Pinterest section 3.2.1, "interest restriction").

An image has the interests of its text and of what people did with it. A cluster stays a label of the image only when
its interest is among these, which tells the senses of "jaguar" (animals, transport) apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.data.text.terms import match_terms


class RestrictionConfig(Config):
    """Interests of an image."""

    share: float = Field(0.65, ge=0, le=1)
    """An image has its best interest and those with at least this share of its score; 0 turns the restriction off."""
    interaction_weight: float = Field(1.0, ge=0)
    """Weight of the terms in ``interactions`` against the scores of annotations; each term's weight is relative to the
    largest of the image. 0 ignores interactions."""


def image_interests(
    evidence: Iterable[tuple[str, float]], voting: Mapping[str, NDArray[np.float32]], share: float
) -> NDArray[np.int64]:
    """Numbers of an image's interests: those with at least ``share`` of the best weighted sum of votes.

    ``evidence``: (term, weight) from annotations and interactions; ``voting``: term -> votes [interests], see
    ``taxonomy.votes``.
    """
    ballots = [(weight, voting[term]) for term, weight in sorted(evidence) if term in voting and weight > 0]
    if not ballots:
        return np.zeros(0, np.int64)
    weights = np.array([weight for weight, _ in ballots], np.float64)
    total = weights @ np.stack([vote for _, vote in ballots]).astype(np.float64)
    return np.nonzero(total >= share * total.max() - 1e-9)[0]


def interaction_evidence(
    signals: Sequence[Mapping[str, Any]] | None, vocabulary: Mapping[str, Any], weight: float
) -> list[tuple[str, float]]:
    """(term, weight) of the vocabulary terms in the ``interactions`` of an image (queries, names of boards)."""
    largest = max((float(signal["weight"]) for signal in signals or ()), default=0.0)
    if largest <= 0 or weight <= 0:
        return []
    weights: dict[str, float] = {}
    for signal in signals or ():
        for term in match_terms(str(signal["term"]), vocabulary):
            weights[term] = max(weights.get(term, 0.0), weight * float(signal["weight"]) / largest)
    return sorted(weights.items())


def map_clusters(terms: list[str], clusters: Mapping[str, Sequence[int]]) -> list[int]:
    """Sorted cluster ids of ``terms``."""
    return sorted({cluster for term in terms for cluster in clusters.get(term, ())})


def restrict(clusters: Sequence[int], interest_of: Mapping[int, int], interests: NDArray[np.int64]) -> list[int]:
    """The ``clusters`` whose interest is among ``interests``."""
    allowed = set(interests.tolist())
    return [cluster for cluster in clusters if interest_of[cluster] in allowed]
