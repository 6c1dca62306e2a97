"""Step 3, clusters: k-means of term embeddings within each interest, with ids that outlive a run (Pinterest 3.2.1).

A term that has several interests may stand in several clusters. Everything here is of dictionary size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

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
"""One row a term of a cluster; ``similarity`` is its cosine to the cluster's centre."""


class TermClusterConfig(Config):
    """Interests of terms, and clusters within each."""

    interests: InterestConfig = InterestConfig()
    terms_per_cluster: float = Field(2.0, ge=1)
    """Mean terms in a cluster: an interest with n terms gets ceil(n / terms_per_cluster) centres."""
    num_clusters: dict[str, int] = Field(default={})
    """Interest -> number of centres, where the rule is not wanted."""
    min_similarity: float = Field(0.7, ge=0, le=1)
    """Cosine to its centre below which a term gets a cluster of its own: k-means must put every term somewhere."""
    carry_over: float = Field(0.3, gt=0, le=1)
    """Share of common terms (Jaccard index) from which a cluster takes over the id of a previous one."""


def cluster_terms(
    terms: Sequence[str],
    vectors: NDArray[np.float32],
    chosen: Sequence[Sequence[int]],
    *,
    interests: Sequence[str],
    config: TermClusterConfig,
    seed: int,
) -> pa.Table:
    """``CLUSTERS`` of sorted ``terms`` [n] with unit ``vectors`` [n, d]; ids count through the interests in order.

    ``chosen`` holds each term's interests as numbers into ``interests``. Raises ``UsageError`` when ``num_clusters``
    names an unknown interest or no number of centres.
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
        members = np.array([row for row, own in enumerate(chosen) if number in own], np.int64)
        if not len(members):
            continue
        by_rule = int(np.ceil(len(members) / config.terms_per_cluster))
        centres = min(config.num_clusters.get(interest, by_rule), len(members))
        labels, similarity = spherical_kmeans(vectors[members], centres, derive_seed(seed, "kmeans", interest))
        labels, similarity = split_outliers(labels, similarity, config.min_similarity)
        used, labels = np.unique(labels, return_inverse=True)
        order = np.lexsort((members, -similarity, labels))
        rows += [
            {
                "cluster": first + int(labels[i]),
                "interest": interest,
                "term": terms[int(members[i])],
                "similarity": float(similarity[i]),
            }
            for i in order
        ]
        first += len(used)
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def spherical_kmeans(vectors: NDArray[np.float32], k: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(labels [n] in 0..k-1, cosine to the own centre [n]) of unit ``vectors`` [n, d], by faiss, seeded."""
    import faiss

    if k >= len(vectors):
        return np.arange(len(vectors), dtype=np.int64), np.ones(len(vectors), np.float32)
    faiss.omp_set_num_threads(1)  # sums in one order: the same clusters on every machine
    means = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=25,
        nredo=3,
        spherical=True,
        seed=seed % (1 << 31),
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 20,
    )
    means.train(np.ascontiguousarray(vectors))
    scores, labels = means.index.search(np.ascontiguousarray(vectors), 1)
    return labels[:, 0].astype(np.int64), scores[:, 0].astype(np.float32)


def split_outliers(
    labels: NDArray[np.int64], similarity: NDArray[np.float32], min_similarity: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels and similarities after each item below ``min_similarity`` has become a cluster of its own."""
    alone = similarity < min_similarity
    fresh = labels.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    labels, similarity = labels.copy(), similarity.copy()
    labels[alone], similarity[alone] = fresh, 1.0
    return labels, similarity


def carry_over(clusters: pa.Table, previous: pa.Table, next_id: int, share: float) -> tuple[pa.Table, int]:
    """``clusters`` with the ids of the ``previous`` clusters they continue, and the first id never used.

    Within an interest clusters are matched one to one so that the Jaccard indices of their terms sum to the most
    (Hungarian method); pairs below ``share`` do not match. Others get new ids from ``next_id`` on: an id that was given
    up is never given to another cluster, so that a classifier's columns can follow the ids.
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
    for cluster in sorted(new):
        if cluster not in ids:
            ids[cluster] = next_id
            next_id += 1
    renamed = pa.array([ids[cluster] for cluster in clusters["cluster"].to_pylist()], pa.int32())
    table = clusters.set_column(0, CLUSTERS.field("cluster"), renamed)
    order = [("cluster", "ascending"), ("similarity", "descending"), ("term", "ascending")]
    return table.sort_by(order).combine_chunks(), next_id


def _members(clusters: pa.Table) -> dict[int, tuple[str, frozenset[str]]]:
    found: dict[int, tuple[str, set[str]]] = {}
    for row in clusters.to_pylist():
        found.setdefault(row["cluster"], (row["interest"], set()))[1].add(row["term"])
    return {cluster: (interest, frozenset(terms)) for cluster, (interest, terms) in found.items()}


def match_sets(left: Sequence[frozenset[str]], right: Sequence[frozenset[str]], share: float) -> Mapping[int, int]:
    """Index in ``left`` -> its partner in ``right``: the one-to-one matching of largest total Jaccard index."""
    from scipy.optimize import linear_sum_assignment

    if not left or not right:
        return {}
    index = np.array([[len(a & b) / len(a | b) for b in right] for a in left])
    rows, columns = linear_sum_assignment(index, maximize=True)
    return {int(i): int(j) for i, j in zip(rows, columns, strict=True) if index[i, j] >= share}
