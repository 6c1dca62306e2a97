"""Step 3, clusters: terms to top-level interests, and k-means within each interest (Pinterest section 3.2.1).

Terms are embedded by a small static text model; a logistic classifier per interest is fitted from a taxonomy with seed
terms. A term may belong to several interests, and so to several clusters. Everything here is of dictionary size.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pydantic import Field

from lookalike import storage
from lookalike.config import Config
from lookalike.data.features import unit_rows
from lookalike.data.terms import canonical
from lookalike.errors import UsageError
from lookalike.registry import Registry
from lookalike.seeds import derive_seed

CLUSTERS = pa.schema([
    pa.field("cluster", pa.int32(), nullable=False), pa.field("interest", pa.string(), nullable=False),
    pa.field("term", pa.string(), nullable=False), pa.field("similarity", pa.float32()),
])  # fmt: skip
"""One row a term of a cluster; ``similarity`` is its cosine to the cluster's centre."""

TERM_EMBEDDERS: Registry[Any] = Registry("term_embedder")


class ClusterConfig(Config):
    """Interests and clusters of terms."""

    taxonomy: str | None = None
    """URI of a YAML file, interest -> seed terms; None: the packaged one with 24 interests."""
    embedder: str = "wordllama"
    """Name in the registry ``lookalike.term_embedder``."""
    interest_score: float = Field(0.5, ge=0, le=1)
    """Probability at which a term belongs to an interest; one always does, its best."""
    max_interests: int = Field(3, ge=1, le=24)
    """Interests of a term at the most."""
    terms_per_cluster: float = Field(2.0, ge=1)
    """Mean terms in a cluster: an interest with n terms gets ceil(n / terms_per_cluster) centres."""
    min_similarity: float = Field(0.85, ge=0, le=1)
    """Cosine to its centre below which a term gets a cluster of its own: k-means must put every term somewhere."""


@TERM_EMBEDDERS.register("wordllama")
def embed_terms(terms: Sequence[str]) -> NDArray[np.float32]:
    """Unit text embeddings [n, 256] by wordllama's packaged static vectors."""
    vectors = np.asarray(_wordllama().embed(list(terms)), dtype=np.float32).reshape(len(terms), -1)
    return unit_rows(vectors)


@cache
def _wordllama() -> Any:
    import wordllama

    folder = Path(wordllama.__file__).parent  # the weights lie inside the wheel: nothing is downloaded
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True)


def read_taxonomy(uri: str | None) -> dict[str, list[str]]:
    """Interest -> canonical seed terms; raises ``UsageError`` when the file has another form."""
    packaged = files("lookalike.data").joinpath("interests.yaml")
    values = yaml.safe_load(packaged.read_bytes() if uri is None else storage.read_bytes(uri))
    if not isinstance(values, dict) or len(values) < 2 or not all(isinstance(v, list) and v for v in values.values()):
        raise UsageError(f"taxonomy {uri}: give a YAML mapping of two or more interests, each to a list of seed terms")
    seeds = {str(name): [term for t in terms if (term := canonical(str(t)))] for name, terms in values.items()}
    empty = [name for name, terms in seeds.items() if not terms]
    if empty:
        raise UsageError(f"taxonomy {uri}: interest {empty[0]!r} has no usable seed term; give nouns of one to three "
                         "words")  # fmt: skip
    return seeds


class InterestClassifier:
    """One logistic classifier an interest on term embeddings."""

    def __init__(self, taxonomy: dict[str, list[str]], embedder: str) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        self.interests = sorted(taxonomy)
        self._embed = TERM_EMBEDDERS.get(embedder)
        terms = sorted({term for seeds in taxonomy.values() for term in seeds})
        target = np.array([[term in taxonomy[name] for name in self.interests] for term in terms], int)
        model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
        self._model = OneVsRestClassifier(model).fit(self._embed(terms), target)
        self._seeds = {term: row for term, row in zip(terms, target, strict=True)}

    def probabilities(self, terms: Sequence[str]) -> NDArray[np.float32]:
        """[n, interests]; a seed term is certain of the interests it is listed under."""
        if not terms:
            return np.zeros((0, len(self.interests)), np.float32)
        found = np.asarray(self._model.predict_proba(self._embed(terms)), np.float32)
        for row, term in enumerate(terms):
            if term in self._seeds:
                found[row] = np.where(self._seeds[term] > 0, 1.0, np.minimum(found[row], 0.3))
        return found


def choose_interests(probabilities: NDArray[np.float32], config: ClusterConfig) -> list[list[int]]:
    """Per term its interests, best first: those at ``interest_score``, ``max_interests`` at most, one at least."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : config.max_interests]
    return [[int(i) for rank, i in enumerate(row) if rank == 0 or p[i] >= config.interest_score]
            for row, p in zip(order, probabilities, strict=True)]  # fmt: skip


def cluster_terms(terms: Sequence[str], classifier: InterestClassifier, config: ClusterConfig, seed: int) -> pa.Table:
    """``CLUSTERS`` of sorted ``terms``: ids count through the interests in the order of their names."""
    if not terms:
        return CLUSTERS.empty_table()
    vectors = TERM_EMBEDDERS.get(config.embedder)(terms)
    chosen = choose_interests(classifier.probabilities(terms), config)
    rows: list[dict[str, Any]] = []
    first = 0
    for number, interest in enumerate(classifier.interests):
        members = np.array([row for row, interests in enumerate(chosen) if number in interests], np.int64)
        if not len(members):
            continue
        centres = int(np.ceil(len(members) / config.terms_per_cluster))
        labels, similarity = spherical_kmeans(vectors[members], centres, derive_seed(seed, "kmeans", interest))
        labels, similarity = split_outliers(labels, similarity, config.min_similarity)
        used, labels = np.unique(labels, return_inverse=True)
        order = np.lexsort((members, -similarity, labels))
        rows += [{"cluster": first + int(labels[i]), "interest": interest, "term": terms[int(members[i])],
                  "similarity": float(similarity[i])} for i in order]  # fmt: skip
        first += len(used)
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def spherical_kmeans(vectors: NDArray[np.float32], k: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(labels [n] in 0..k-1, cosine to the own centre [n]) of unit ``vectors`` [n, d], by faiss, seeded."""
    import faiss

    if k >= len(vectors):
        return np.arange(len(vectors), dtype=np.int64), np.ones(len(vectors), np.float32)
    faiss.omp_set_num_threads(1)  # sums in one order: the same clusters on every machine
    means = faiss.Kmeans(vectors.shape[1], k, niter=25, nredo=3, spherical=True, seed=seed % (1 << 31),
                         min_points_per_centroid=1, max_points_per_centroid=1 << 20)  # fmt: skip
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
