"""Shortlist index types: each is a function from unit-length prefixes to a faiss index, found by name.

To add one, register a builder; it must give the same bytes for the same vectors, which is why builds use one thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
from pydantic import Field

from lookalike.config import Config
from lookalike.errors import ArtifactError
from lookalike.registry import Registry
from lookalike.retrieval.kernels import faiss_threads
from lookalike.retrieval.ranking import NO_SCORE, Floats, Hits, empty_hits


class ShortlistOptions(Config):
    """Build settings of the index types; each reads those it knows."""

    hnsw_m: int = Field(default=32, ge=2, le=256)
    """Links a node of the HNSW graph keeps per layer (twice as many on the lowest)."""
    ef_construction: int = Field(default=80, ge=4, le=4096)
    """Candidates HNSW weighs for each vector it adds."""


SHORTLISTS: Registry[Callable[[Floats, ShortlistOptions], faiss.Index]] = Registry("shortlist")


@SHORTLISTS.register("flat")
def build_flat(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A scan of a copy of the prefixes: exact, and as large as they are."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


@SHORTLISTS.register("hnsw")
def build_hnsw(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A navigable graph (Malkov and Yashunin), inner product of unit vectors = cosine."""
    index = faiss.IndexHNSWFlat(vectors.shape[1], options.hnsw_m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction
    index.add(vectors)
    return index


def build_shortlist(kind: str, vectors: Floats, options: ShortlistOptions) -> "Shortlist":
    """An index of type ``kind`` over unit-length ``vectors`` float32 [n, dim]; the same input gives the same bytes."""
    with faiss_threads(1):
        return Shortlist(SHORTLISTS.get(kind)(vectors, options))


def shortlist_name(dim: int) -> str:
    """File name of the index over the first ``dim`` dimensions."""
    return f"shortlist-{dim:05d}.faiss"


class Shortlist:
    """A faiss index over one prefix of one shard."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    @classmethod
    def load(cls, path: str, *, num_rows: int, dim: int) -> "Shortlist":
        """Open a saved index through a memory map; ``ArtifactError`` when it is missing, damaged or another's."""
        try:
            index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be read ({reason}); build the index again") from None
        if (index.ntotal, index.d) != (num_rows, dim):
            raise ArtifactError(f"{path} indexes {index.ntotal} vectors of {index.d}-d where {num_rows} of {dim}-d are "
                                "expected; build the index again")  # fmt: skip
        return cls(index)

    def save(self, path: str) -> None:
        """Write the index to a file."""
        faiss.write_index(self.index, path)

    def search(self, queries: Floats, k: int, ef_search: int | None = None) -> Hits:
        """The ``k`` nearest (as the index type finds them) of unit-length ``queries`` [n, dim]; rows of the shard.

        Best first, but equal scores in any order: whoever makes an answer of them ranks them.
        """
        if self.index.ntotal == 0 or not len(queries):
            return empty_hits(len(queries), k)
        found = min(k, self.index.ntotal)
        parameters = None
        if isinstance(self.index, faiss.IndexHNSW):
            ef = max(found, ef_search or found)
            parameters = faiss.SearchParametersHNSW(efSearch=ef)  # type: ignore[attr-defined]  # not in faiss's stubs
        with faiss_threads():
            scores, rows = self.index.search(queries, found, params=parameters)
        scores[rows < 0] = NO_SCORE
        return Hits(rows, scores)


@contextmanager
def count_distances() -> Iterator[Callable[[], int]]:
    """Yields a function that tells how many distances HNSW searches of this process have computed in the block."""
    stats = faiss.cvar.hnsw_stats  # type: ignore[attr-defined]  # not in faiss's stubs
    before = int(stats.ndis)
    yield lambda: int(stats.ndis) - before
