"""Clusters of terms: k-means of term embeddings within each interest, with ids that outlive a run (Pinterest 3.2.1).

A term with several interests may be in several clusters. All tables here are of the size of the dictionary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.data.interests.taxonomy import InterestConfig
from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.seeds import derive_seed

CLUSTERS = pa.schema(
    [
        pa.field("cluster", pa.int32(), nullable=False),
        pa.field("interest", pa.string(), nullable=False),
        pa.field("term", pa.string(), nullable=False),
        pa.field("similarity", pa.float32()),
    ]
)
"""One row per term of a cluster; ``similarity`` is its cosine to the centre of the cluster."""
PRODUCTS = 2e9
"""Multiply-adds of vectors with centres, once per start, that the starts of one k-means may add up to."""


class TermClusterConfig(Config):
    """Interests of terms, and clusters within each."""

    interests: InterestConfig = InterestConfig()
    terms_per_cluster: float = Field(2.0, ge=1)
    """Terms of a cluster on average: an interest with n terms gets ceil(n / terms_per_cluster) centres."""
    num_clusters: dict[str, int] = Field(default={})
    """Interest -> number of centres, where it should not follow from ``terms_per_cluster``."""
    min_similarity: float = Field(0.7, ge=0, le=1)
    """Cosine to its centre below which a term becomes a separate cluster: k-means has to put every term somewhere."""
    carry_over: float = Field(0.3, gt=0, le=1)
    """Share of common terms (Jaccard index) at which a cluster takes over the id of a cluster of the previous run."""


def cluster_terms(
    terms: list[str],
    vectors: NDArray[np.float32],
    interests_of: Sequence[Sequence[int]],
    *,
    interests: list[str],
    config: TermClusterConfig,
    seed: int,
) -> pa.Table:
    """``CLUSTERS`` of sorted ``terms`` [n] with unit ``vectors`` [n, d]; ids count through the interests in order.

    ``interests_of``: the interests of each term, as positions in ``interests``. Raises ``UsageError`` if
    ``num_clusters`` names an unknown interest or asks for less than one centre.
    """
    for name, centres in config.num_clusters.items():
        if name not in interests or centres < 1:
            raise UsageError(
                f"clusters.num_clusters has {name!r}: {centres}; give an interest of the taxonomy"
                f"{nearest(name, list(interests))} and at least one centre"
            )
    rows: list[dict[str, Any]] = []
    first = 0
    for number, interest in enumerate(interests):
        members = np.array([row for row, own in enumerate(interests_of) if number in own], np.int64)
        if not len(members):
            continue
        by_rule = int(np.ceil(len(members) / config.terms_per_cluster))
        centres = min(config.num_clusters.get(interest, by_rule), len(members))
        labels, similarity = kmeans(vectors[members], centres, derive_seed(seed, "kmeans", interest))
        labels, similarity = split_outliers(labels, similarity, config.min_similarity)
        used, labels = np.unique(labels, return_inverse=True)
        order = np.lexsort((members, -similarity, labels))
        ranked = zip(*(values[order].tolist() for values in (labels, members, similarity)), strict=True)
        rows += [
            {"cluster": first + label, "interest": interest, "term": terms[row], "similarity": cosine}
            for label, row, cosine in ranked
        ]
        first += len(used)
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def kmeans(vectors: NDArray[np.float32], k: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(label [n] in 0..k-1, cosine to the mean of its cluster [n]) of each of the unit ``vectors`` [n, d].

    The best by inertia of several starts by k-means++: 100 for a small set, 3 for a large one.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    _, first, same = np.unique(vectors, axis=0, return_index=True, return_inverse=True)
    if k >= len(first):  # a cluster for each distinct vector, in order of appearance
        return np.searchsorted(np.sort(first), first[same.ravel()]), np.ones(len(vectors), np.float32)
    data = vectors.astype(np.float64)
    starts = int(np.clip(PRODUCTS / (data.size * k), 3, 100))
    with threadpool_limits(1):  # the order of sums is fixed: the same clusters on every machine
        means = KMeans(k, n_init=starts, random_state=seed % (1 << 32)).fit(data)
    labels, centres = means.labels_.astype(np.int64), means.cluster_centers_
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return labels, np.einsum("nd,nd->n", data, centres[labels]).astype(np.float32)


def split_outliers(
    labels: NDArray[np.int64], similarity: NDArray[np.float32], min_similarity: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(labels, similarities) after every item below ``min_similarity`` has become a separate cluster."""
    alone = similarity < min_similarity
    fresh = labels.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    labels, similarity = labels.copy(), similarity.copy()
    labels[alone], similarity[alone] = fresh, 1.0
    return labels, similarity


class CarriedClusters(NamedTuple):
    """Clusters under lasting ids."""

    clusters: pa.Table
    """``CLUSTERS``, by id."""
    next_id: int
    """The first id that was never used."""
    carried: int
    """Clusters that continue a previous one."""


def carry_over(clusters: pa.Table, previous: pa.Table, next_id: int, share: float) -> CarriedClusters:
    """Give ``clusters`` the ids of the ``previous`` clusters they continue, and new ids from ``next_id`` to the others.

    Within an interest clusters are matched one to one so that the sum of the Jaccard indices of their terms is largest
    (Hungarian method); pairs below ``share`` do not match. An id that was given up is never used again, so the columns
    of a classifier can follow the ids.
    """
    old, new = _members(previous), _members(clusters)
    by_interest: dict[str, list[int]] = defaultdict(list)
    for cluster, (interest, _) in sorted(new.items()):
        by_interest[interest].append(cluster)
    ids: dict[int, int] = {}
    for interest, mine in by_interest.items():
        theirs = [cluster for cluster, (other, _) in sorted(old.items()) if other == interest]
        matched = match_sets([new[c][1] for c in mine], [old[c][1] for c in theirs], share)
        ids |= {mine[i]: theirs[j] for i, j in matched.items()}
    count = len(ids)
    for cluster in sorted(new.keys() - ids.keys()):
        ids[cluster] = next_id
        next_id += 1
    renamed = pa.array([ids[cluster] for cluster in clusters["cluster"].to_pylist()], pa.int32())
    table = clusters.set_column(0, CLUSTERS.field("cluster"), renamed)
    order = [("cluster", "ascending"), ("similarity", "descending"), ("term", "ascending")]
    return CarriedClusters(table.sort_by(order).combine_chunks(), next_id, count)


def _members(clusters: pa.Table) -> dict[int, tuple[str, frozenset[str]]]:
    """Cluster -> (interest, terms)."""
    members: dict[int, tuple[str, set[str]]] = {}
    for row in clusters.to_pylist():
        members.setdefault(row["cluster"], (row["interest"], set()))[1].add(row["term"])
    return {cluster: (interest, frozenset(terms)) for cluster, (interest, terms) in members.items()}


def match_sets(left: Sequence[frozenset[str]], right: Sequence[frozenset[str]], share: float) -> Mapping[int, int]:
    """Index in ``left`` -> its partner in ``right``: the one-to-one matching of largest total Jaccard index."""
    from scipy.optimize import linear_sum_assignment

    if not left or not right:
        return {}
    index = np.array([[len(a & b) / len(a | b) for b in right] for a in left])
    rows, columns = linear_sum_assignment(index, maximize=True)
    return {int(i): int(j) for i, j in zip(rows, columns, strict=True) if index[i, j] >= share}
