"""Interests of terms, learned from a taxonomy that lists seed terms under each interest (Pinterest section 3.2.1).

A word may have several senses ("jaguar": animals, transport), so a term may belong to several interests.
"""

from collections.abc import Mapping
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lookalike import storage
from lookalike.config import Config
from lookalike.data.interests.term_embedders import embed_terms
from lookalike.data.text.terms import canonical
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml

MOST_BYTES = 8 << 20  # of the file
UNLISTED = 0.3  # upper bound of a seed term's probability for an interest under which the taxonomy does not list it


class InterestConfig(Config):
    """Interests of terms."""

    taxonomy: str | None = None
    """URI of a YAML file that maps interests to seed terms; None: the packaged file with 24 interests."""
    embedder: str = "minilm"
    """Name in the registry ``lookalike.term_embedder``."""
    score: float = Field(0.5, ge=0, le=1)
    """Probability from which on a term belongs to an interest. It always belongs to its most probable interest."""
    most: int = Field(3, ge=1, le=24)
    """Most interests of a term."""


def read_taxonomy(uri: str | None) -> dict[str, list[str]]:
    """Interest -> canonical seed terms; raises ``UsageError`` if the file has another form."""
    packaged = files("lookalike.data.interests").joinpath("interests.yaml")
    values = parse_yaml(
        packaged.read_bytes() if uri is None else storage.read_bytes(uri), f"taxonomy {uri}", MOST_BYTES
    )
    if not isinstance(values, dict) or len(values) < 2 or not all(isinstance(v, list) and v for v in values.values()):
        raise UsageError(f"taxonomy {uri}: give a YAML mapping of two or more interests, each to a list of seed terms")
    seeds = {
        str(name): list(dict.fromkeys(term for t in terms if (term := canonical(str(t)))))
        for name, terms in values.items()
    }
    empty = [name for name, terms in seeds.items() if not terms]
    if empty:
        raise UsageError(
            f"taxonomy {uri}: interest {empty[0]!r} has no usable seed term; give nouns of one to three words"
        )
    return seeds


class InterestClassifier:
    """One logistic classifier per interest, on term embeddings: several interests may apply."""

    def __init__(self, taxonomy: Mapping[str, list[str]], embedder: str) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        self.interests = sorted(taxonomy)
        self._embedder = embedder
        terms = sorted({term for seeds in taxonomy.values() for term in seeds})
        target = np.array([[term in taxonomy[name] for name in self.interests] for term in terms], int)
        model = LogisticRegression(C=10.0, class_weight="balanced", solver="liblinear", max_iter=2000)
        self._model = OneVsRestClassifier(model).fit(embed_terms(embedder, terms), target)
        self._seeds = {term: row for term, row in zip(terms, target, strict=True)}

    def probabilities(self, terms: list[str], vectors: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Probabilities [n, interests]; those of a seed term are 1 for the interests that list it.

        ``vectors`` [n, d]: embeddings of the terms; None: they are computed.
        """
        if not terms:
            return np.zeros((0, len(self.interests)), np.float32)
        vectors = embed_terms(self._embedder, terms) if vectors is None else vectors
        result = np.asarray(self._model.predict_proba(vectors), np.float32).round(4)
        for row, term in enumerate(terms):
            if term in self._seeds:
                result[row] = np.where(self._seeds[term] > 0, 1.0, np.minimum(result[row], UNLISTED))
        return result


def choose_interests(probabilities: NDArray[np.float32], config: InterestConfig) -> list[list[int]]:
    """Interests of each term, best first: those with a probability of at least ``score``, between one and ``most``."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : config.most]
    return [
        [int(i) for rank, i in enumerate(row) if rank == 0 or p[i] >= config.score]
        for row, p in zip(order, probabilities, strict=True)
    ]


def votes(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, interests]: one vote per term, split over its interests; less than one if no interest is clear."""
    return np.asarray(probabilities / np.maximum(probabilities.sum(axis=1, keepdims=True), 1.0), np.float32)
