"""The decision boundary of the visual dictionary, chosen by a criterion (Pinterest section 3.2.1).

The paper takes the boundary with the best pretraining. Two cheaper criteria stand in for that sweep:

- ``words``: a list of words known to be concrete or abstract. The boundary that tells them apart best is taken, by
  balanced accuracy (Youden's index is twice that, less one).
- ``retrieval``: for each candidate boundary, a ridge regression from frozen features to the kept terms of random
  training images, the cheapest model that learns from them. Its predictions represent the validation images, which are
  judged by P@1: does the nearest image share the group, or the category? The smallest boundary within one standard
  error of the best is taken, so that no term is dropped without a measured reason. The predictions are linear in the
  features: the criterion sees which directions the kept terms supervise, not what a deep model makes of them.
"""

import csv
import io
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.data.dictionary.sketch import Pools
from lookalike.data.text.terms import canonical
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml

CANDIDATES = np.arange(50, 100) / 100
RETRIEVAL_EVERY = 5  # the retrieval criterion tries every fifth candidate: each needs all pairs of images
TERM_CHUNK = 8192  # terms whose regressions are in memory at a time


class BoundaryConfig(Config):
    """How the boundary is chosen."""

    criterion: Literal["words", "retrieval"]
    """``words`` needs a list, ``retrieval`` a validation split."""
    words: str | None = None
    """URI of the list: YAML with the lists ``concrete`` and ``abstract``, or CSV with the columns term, concrete (0 or
    1)."""
    split: str = "val"
    """Split of the corpus whose images are the validation set."""
    images: int = Field(4096, ge=16, le=32_768)
    """Most validation images, chosen by hash among those with a group or a category."""
    ridge: float = Field(0.1, gt=0, le=1000)
    """Penalty of the regression, relative to the mean squared feature."""

    @model_validator(mode="after")
    def _complete(self) -> "BoundaryConfig":
        if self.criterion == "words" and self.words is None:
            raise ValueError("boundary_from.criterion 'words' needs boundary_from.words, the URI of a word list")
        return self


class BoundaryChoice(NamedTuple):
    """A boundary and the curve on which it was chosen."""

    boundary: float
    criterion: str
    """Name of ``value`` in the curve."""
    curve: list[dict[str, float]]
    """For each candidate ``boundary``: the number of ``terms`` at or above it, and ``value``."""
    facts: dict[str, float]
    """Other measurements."""


def read_words(uri: str) -> dict[str, bool]:
    """Canonical term -> whether it is concrete; raises ``UsageError`` if the file has another form."""
    content = storage.read_bytes(uri)
    try:
        if uri.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(content.decode())))
            named = {row["term"]: {"0": False, "1": True}[row["concrete"].strip()] for row in rows}
        else:
            values = parse_yaml(content, f"word list {uri}")
            named = {str(word): side == "concrete" for side in ("abstract", "concrete") for word in values[side]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"word list {uri} cannot be read ({error!r}); give YAML with the lists 'concrete' and "
            "'abstract', or CSV with the columns term, concrete (0 or 1)"
        ) from None
    words = {term: concrete for word, concrete in named.items() if (term := canonical(word))}
    if len(set(words.values())) < 2:
        raise UsageError(f"word list {uri} has {len(words)} usable words of one kind; give concrete and abstract ones")
    return words


def ranking_auc(dictionary: pa.Table, concrete: list[str], abstract: list[str]) -> float:
    """Share of (concrete, abstract) pairs that concreteness ranks in the right order; a tie counts half.

    ``dictionary`` needs ``term`` and ``concreteness``. Words without a score are left out; NaN if a side has none left.
    """
    high, low = (_scores_of(dictionary, words) for words in (concrete, abstract))
    if not len(high) or not len(low):
        return float("nan")
    return float(((high[:, None] > low).mean() + (high[:, None] >= low).mean()) / 2)


def _scores_of(dictionary: pa.Table, words: list[str]) -> NDArray[np.float32]:
    scores = dict(zip(dictionary["term"].to_pylist(), dictionary["concreteness"].to_pylist(), strict=True))
    return np.array([scores[word] for word in words if scores.get(word) is not None], np.float32)


def choose_by_words(dictionary: pa.Table, words: dict[str, bool]) -> BoundaryChoice:
    """The smallest candidate with the best balanced accuracy; raises ``UsageError`` if too few words have scores."""
    sides = [[word for word, concrete in words.items() if concrete == wanted] for wanted in (True, False)]
    high, low = (_scores_of(dictionary, side) for side in sides)
    if min(len(high), len(low)) < 5:
        raise UsageError(
            f"of the word list {len(high)} concrete and {len(low)} abstract words are scored terms, 5 of "
            "each are needed; give a list in the corpus's own words, or dictionary.boundary"
        )
    at = CANDIDATES.astype(np.float32)
    values = ((high >= at[:, None]).mean(axis=1) + (low < at[:, None]).mean(axis=1)) / 2
    facts = {"auc": round(ranking_auc(dictionary, *sides), 4), "concrete_words": len(high), "abstract_words": len(low)}
    best = float(CANDIDATES[int(values.argmax())])
    return BoundaryChoice(best, "balanced accuracy", _curve(dictionary, CANDIDATES, values), facts)


def _curve(dictionary: pa.Table, at: NDArray[np.float64], values: NDArray[np.floating]) -> list[dict[str, float]]:
    scores = dictionary["concreteness"].drop_null().to_numpy()
    return [
        {"boundary": float(b), "terms": int((scores >= np.float32(b)).sum()), "value": round(float(v), 5)}
        for b, v in zip(at, values, strict=True)
    ]


def choose_by_retrieval(
    dictionary: pa.Table, pools: Pools, vectors: NDArray[Any], labels: list[str], ridge: float
) -> BoundaryChoice:
    """The smallest candidate whose P@1 is within one standard error of the best.

    ``vectors`` [n, D] and ``labels`` [n]: the validation images; only those that share their label with another are
    queries. Memory: n x n floats, and D x ``TERM_CHUNK``.
    """
    codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1] if len(labels) else np.zeros(0, np.int64)
    queries = np.nonzero(np.bincount(codes)[codes] > 1)[0] if len(codes) else codes
    if len(queries) < 16:
        raise UsageError(
            f"the validation split has {len(queries)} images that share a group or category with another, "
            "16 are needed; name another split as boundary_from.split"
        )
    mean = pools.vectors.astype(np.float32).mean(axis=0)
    images = np.asarray(vectors, np.float32) - mean
    at = CANDIDATES[::RETRIEVAL_EVERY]
    values = np.array([_p_at_1(images, gram, queries, codes) for gram in _grams(dictionary, pools, mean, at, ridge)])
    best = float(values.max())
    error = float(np.sqrt(best * (1 - best) / len(queries)))
    smallest = int(np.nonzero(values >= best - error)[0][0])
    facts = {"standard_error": round(error, 5), "queries": len(queries)}
    return BoundaryChoice(float(at[smallest]), "P@1 of the validation images", _curve(dictionary, at, values), facts)


def _grams(
    dictionary: pa.Table, pools: Pools, mean: NDArray[np.float32], at: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """W W^T [candidates, D, D]; W: regressions to the terms at or above a candidate, targets scaled to variance 1."""
    x = pools.vectors.astype(np.float32) - mean
    spread = x.T @ x / len(x)
    inverse = np.linalg.inv(spread + ridge * np.trace(spread) / len(spread) * np.eye(len(spread)))
    scores = dict(zip(dictionary["term"].to_pylist(), dictionary["concreteness"].to_pylist(), strict=True))
    level = np.array([scores.get(term) or 0.0 for term in pools.terms.to_pylist()], np.float32)
    bins = np.searchsorted(at.astype(np.float32), level, side="right")  # candidates that keep the term
    grams = np.zeros((len(at) + 1, *spread.shape))
    for start in range(0, len(level), TERM_CHUNK):
        places = np.arange(start, min(start + TERM_CHUNK, len(level)))
        places = places[bins[places] > 0]
        sums = [_centred_sum(x, pools.rows_of(place)) for place in places.tolist()]
        weights = inverse @ np.array(sums).reshape(-1, len(spread)).T
        for kept in np.unique(bins[places]).tolist():
            own = weights[:, bins[places] == kept]
            grams[kept] += own @ own.T
    return np.asarray(np.cumsum(grams[::-1], axis=0)[::-1][1:])


def _centred_sum(x: NDArray[np.float32], rows: NDArray[np.integer]) -> NDArray[np.float64]:
    share = len(rows) / len(x)
    return np.asarray(x[rows].sum(axis=0) / len(x) / np.sqrt(max(share * (1 - share), 1e-12)), dtype=np.float64)


def _p_at_1(
    images: NDArray[np.float32], gram: NDArray[np.float64], queries: NDArray[np.integer], codes: NDArray[np.integer]
) -> float:
    """P@1 of ``queries`` by cosine of the predictions, whose inner products are x^T (W W^T) y."""
    values, axes = np.linalg.eigh(gram)
    small = images @ (axes * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-12)
    similar = small[queries] @ small.T
    similar[np.arange(len(queries)), queries] = -np.inf
    return float((codes[similar.argmax(axis=1)] == codes[queries]).mean())
