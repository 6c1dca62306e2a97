"""A shortlist index over one prefix of one shard: built, saved, opened, searched. ``index_types.py`` has the types.

Scores of types that store codes are not cosines (``Shortlist.is_exact``): the caller then reads the stored prefixes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import faiss
import numpy as np

from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.filters import Allowed
from lookalike.retrieval.graph import Graph
from lookalike.retrieval.index_types import SHORTLISTS, ShortlistOptions, strict_signs
from lookalike.retrieval.kernels import faiss_threads
from lookalike.retrieval.ranking import NO_SCORE, Floats, Hits, empty_hits

NPROBE = 16
"""Lists that an IVF type probes if the plan does not say."""


def build_shortlist(kind: str, vectors: Floats, options: ShortlistOptions) -> "Shortlist | Graph":
    """An index of type ``kind`` over unit-length ``vectors`` float32 [n, dim]; the same input gives the same bytes.

    Raises ``UsageError`` naming the first row that holds NaN or infinity.
    """
    bad = np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))
    if len(bad):
        raise UsageError(f"row {bad[0]} of the vectors holds NaN or infinity; a shortlist takes finite numbers")
    with faiss_threads(1):
        built = SHORTLISTS.get(kind)(vectors, options)
    return built if isinstance(built, Graph) else Shortlist(built)


def load_shortlist(kind: str, path: str, *, num_rows: int, dim: int) -> "Shortlist | Graph":
    """Open a saved index of type ``kind``; ``ArtifactError`` if it is missing, damaged or of another shard."""
    return (Graph if kind == "graph" else Shortlist).load(path, num_rows=num_rows, dim=dim)


def shortlist_name(dim: int, kind: str) -> str:
    """File name of the index of type ``kind`` over the first ``dim`` dimensions."""
    return f"shortlist-{dim:05d}.{'graph' if kind == 'graph' else 'faiss'}"


class Shortlist:
    """A faiss index over one prefix of one shard."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index
        self._turned = isinstance(index, faiss.IndexPreTransform)
        self._inner: Any = index
        self._signs = getattr(index, "rotate_data", True) is False  # an IndexLSH over the signs of the prefix itself
        if isinstance(index, faiss.IndexPreTransform):
            self._inner = faiss.downcast_index(index.index)

    @classmethod
    def load(cls, path: str, *, num_rows: int, dim: int) -> "Shortlist":
        """Memory-map a saved index; ``ArtifactError`` if it is missing, damaged or of another shard."""
        try:
            index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(f"{path} cannot be read ({reason}); build the index again") from None
        if (index.ntotal, index.d) != (num_rows, dim):
            raise ArtifactError(
                f"{path} indexes {index.ntotal} vectors of {index.d}-d where {num_rows} of {dim}-d are "
                "expected; build the index again"
            )
        return cls(index)

    def save(self, path: str) -> None:
        """Write the index to a file."""
        faiss.write_index(self.index, path)

    @property
    def is_exact(self) -> bool:
        """Whether its scores are cosines: it stores the vectors themselves, not codes."""
        return isinstance(self.index, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))

    @property
    def nlist(self) -> int:
        """Lists of an IVF type, each with a centroid that every query is compared with; 0 for other types."""
        return int(self._inner.nlist) if isinstance(self._inner, faiss.IndexIVF) else 0

    @property
    def takes_filters(self) -> bool:
        """Whether :meth:`search` can leave rows out; without that, allowed rows are scanned."""
        return not isinstance(self._inner, faiss.IndexLSH)

    @property
    def is_graph(self) -> bool:
        """Whether it finds neighbours by walking a graph."""
        return isinstance(self._inner, faiss.IndexHNSW)

    def search(
        self,
        queries: Floats,
        k: int,
        *,
        ef_search: int | None = None,
        nprobe: int | None = None,
        allowed: Allowed | None = None,
        widen: int = 1,
    ) -> Hits:
        """The ``k`` nearest rows of the shard to unit-length ``queries`` [n, dim], as the index type finds them.

        Best first; the caller orders equal scores. An IVF type may find fewer than ``k``: only what its probed lists
        hold. ``allowed`` skips other rows and widens the beam by the inverse of their share; ``widen`` multiplies it.
        """
        wanted = min(k, self.index.ntotal if allowed is None else allowed.num_rows)
        if not wanted or not len(queries):
            return empty_hits(len(queries), k)
        wider = widen * (1.0 if allowed is None else 1 / allowed.share)
        ef, probes = math.ceil((ef_search or wanted) * wider), math.ceil((nprobe or NPROBE) * wider)
        settings = self._settings(max(wanted, ef), probes, allowed)
        queries = strict_signs(queries) if self._signs else queries
        with faiss_threads():
            scores, rows = self.index.search(queries, wanted, params=settings)
        scores[rows < 0] = NO_SCORE
        return Hits(rows, scores)

    def _settings(self, ef: int, nprobe: int, allowed: Allowed | None) -> Any:
        module: Any = faiss  # its stubs lack the keywords of these classes
        only = {} if allowed is None else {"sel": allowed.selector}
        if self.is_graph:
            return module.SearchParametersHNSW(efSearch=ef, **only)
        if self.nlist:
            settings = module.SearchParametersIVF(nprobe=min(self.nlist, nprobe), **only)
            return module.SearchParametersPreTransform(index_params=settings) if self._turned else settings
        return module.SearchParameters(**only) if only else None


class Work(NamedTuple):
    """Counts over searches."""

    distances: int
    """Distances computed by HNSW, or scores by the int8 graph."""
    listed: int
    """Rows in the IVF lists that were probed."""


@contextmanager
def count_work() -> Iterator[Callable[[], Work]]:
    """Yield a function that returns the work of all searches of this process since the block began."""
    graph, lists = faiss.cvar.hnsw_stats, faiss.cvar.indexIVF_stats  # type: ignore[attr-defined]  # not in faiss's stubs
    before = Work(int(graph.ndis) + Graph.computed, int(lists.ndis))
    yield lambda: Work(int(graph.ndis) + Graph.computed - before.distances, int(lists.ndis) - before.listed)
