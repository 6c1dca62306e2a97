"""Shortlist index types: each is a function from unit-length prefixes to a faiss index, found by name.

To add one, register a builder (a name that begins with ``hnsw`` or ``graph`` takes ``ef_search``, with ``ivf``
``nprobe``); it must give the same bytes for the same vectors, which is why builds use one thread, fixed seeds and a
seeded sample to train on.

| type | a row takes, in bytes (beside links and ids) | finds |
|---|---|---|
| ``flat`` | 4 a dimension | every row, exactly |
| ``hnsw`` | 4 a dimension, and 8 a link | by walking a graph; ``ef_search`` |
| ``graph`` | 1 a dimension, 4, and 8 a link | by walking the lowest layer of that graph, in C; see ``graph.py`` |
| ``hnsw-sq8`` | 1 a dimension, and 8 a link | the same over 8-bit numbers |
| ``ivf`` | 4 a dimension, 8 for the id | in the ``nprobe`` nearest of ``nlist`` lists |
| ``ivf-pq`` | 1/2 per ``pq_dims`` dimensions, 8 | the same over 4-bit codes, in registers (fast-scan) |
| ``ivf-rabitq`` | ``rabitq_bits``/8 a dimension, 16 | the same over rotated sign bits with error-corrected scores |
| ``binary`` | 1/8 a dimension | every row, by Hamming distance of rotated sign bits |
| ``binary-signs`` | 1/8 a dimension | the same of the prefix's own sign bits, which tasks of kind ``binary`` train |

Scores of the types that store something else than the vectors are no cosines (``Shortlist.is_exact``); whoever makes
an answer of them reads the stored prefix first. A shard of fewer than ``MIN_TRAINED`` rows has too few to train
codebooks with and nothing to gain: there the types that need training are flat.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from pydantic import Field

from lookalike.config import Config
from lookalike.errors import ArtifactError, UsageError
from lookalike.registry import Registry
from lookalike.retrieval.filters import Allowed
from lookalike.retrieval.graph import Graph, build_graph
from lookalike.retrieval.kernels import faiss_threads
from lookalike.retrieval.ranking import NO_SCORE, Floats, Hits, empty_hits

MIN_TRAINED = 1000
"""Rows from which on a shard trains codebooks."""
MIN_PER_LIST = 39
"""Rows that k-means asks for per list; with fewer, lists would be noise."""
HNSW_M, EF_CONSTRUCTION = 32, 80
"""Links and candidates of faiss's HNSW when the settings do not say."""
NPROBE = 16
"""Lists that an IVF type looks into when the plan does not say."""


class ShortlistOptions(Config):
    """Build settings of the index types; each reads those it knows."""

    hnsw_m: int | None = Field(default=None, ge=2, le=256)
    """Links a node of a graph keeps per layer (twice as many on the lowest); 16 for ``graph``, else 32."""
    ef_construction: int | None = Field(default=None, ge=4, le=4096)
    """Candidates weighed for each vector that a graph takes; 120 for ``graph``, else 80."""
    nlist: int | None = Field(default=None, ge=1, le=1 << 20)
    """Lists of an IVF type; 2 * sqrt(rows of the shard) by default, and never more than rows / 39."""
    train_per_list: int = Field(default=64, ge=MIN_PER_LIST, le=4096)
    """Rows per list that centroids and codebooks are trained with, at most: a seeded sample."""
    coarse_dim: int | None = Field(default=None, ge=1)
    """Dimensions that the lists of ``ivf`` and ``ivf-pq`` are made by, where they are fewer than the shortlist's: lists
    by a short prefix, rows compared by a longer one (AdANNS, Rege et al. 2023). The shortlist's own by default."""
    pq_dims: int = Field(default=1, ge=1, le=64)
    """Dimensions that share one 4-bit code of ``ivf-pq``; lowered to a divisor of the prefix."""
    rabitq_bits: int = Field(default=1, ge=1, le=9)
    """Bits a dimension of ``ivf-rabitq``."""


SHORTLISTS: Registry[Callable[[Floats, ShortlistOptions], faiss.Index | Graph]] = Registry("shortlist")


@SHORTLISTS.register("flat")
def build_flat(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A scan of a copy of the prefixes: exact, and as large as they are."""
    return _flat(vectors)


@SHORTLISTS.register("hnsw")
def build_hnsw(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A navigable graph (Malkov and Yashunin), inner product of unit vectors = cosine."""
    index = faiss.IndexHNSWFlat(vectors.shape[1], options.hnsw_m or HNSW_M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction or EF_CONSTRUCTION
    index.add(vectors)
    return index


@SHORTLISTS.register("graph")
def build_int8_graph(vectors: Floats, options: ShortlistOptions) -> Graph:
    """The lowest layer of the same graph over int8 codes, searched by the C library."""
    return build_graph(vectors, hnsw_m=options.hnsw_m or 16, ef_construction=options.ef_construction or 120)


@SHORTLISTS.register("hnsw-sq8")
def build_hnsw_sq8(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """The same graph over numbers of 8 bits, each dimension between its smallest and largest value."""
    if len(vectors) < MIN_TRAINED:
        return _flat(vectors)
    eight_bits: Any = faiss.ScalarQuantizer.QT_8bit  # an int; faiss's stubs ask for another class
    index = faiss.IndexHNSWSQ(vectors.shape[1], eight_bits, options.hnsw_m or HNSW_M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction or EF_CONSTRUCTION
    index.train(vectors)  # two passes for the extremes: all rows, so that none is clipped
    index.add(vectors)
    return index


@SHORTLISTS.register("ivf")
def build_ivf(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists by nearest centroid that hold the prefixes as they are."""
    return _build_lists(vectors, options, "Flat")


@SHORTLISTS.register("ivf-pq")
def build_ivf_pq(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists of product-quantised residuals (Jegou et al.), 4 bits a code so that tables fit registers."""
    dim = vectors.shape[1]
    share = max(size for size in range(1, min(options.pq_dims, dim) + 1) if dim % size == 0)
    return _build_lists(vectors, options, f"PQ{dim // share}x4fs")


@SHORTLISTS.register("ivf-rabitq")
def build_ivf_rabitq(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists of RaBitQ codes (Gao and Long) after the random rotation that their error bound rests on."""
    bits = "" if options.rabitq_bits == 1 else str(options.rabitq_bits)
    return _build_lists(vectors, options, f"RaBitQfs{bits}", rotate=True)


@SHORTLISTS.register("binary")
def build_binary(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Sign bits of the rotated prefix (seed fixed in faiss), one a dimension; all are compared."""
    return _signs(vectors, rotate=True)


@SHORTLISTS.register("binary-signs")
def build_binary_signs(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Sign bits of the prefix as it is: the codes of an embedding that a task of kind ``binary`` has trained (Zhai and
    Wu 2019 binarise at zero too). A rotation would mix what the task has made of each dimension."""
    return _signs(vectors, rotate=False)


def effort_of(kind: str) -> Literal["ef_search", "nprobe"] | None:
    """Which field of a plan sets the effort of a type's search, told by how its name begins."""
    return "ef_search" if kind.startswith(("hnsw", "graph")) else "nprobe" if kind.startswith("ivf") else None


def choose_nlist(num_rows: int, options: ShortlistOptions) -> int:
    """Lists of an IVF type over ``num_rows``: as asked for, or 2 * sqrt(n); at most n / 39, at least 1."""
    wanted = round(2 * math.sqrt(num_rows)) if options.nlist is None else options.nlist
    return max(1, min(wanted, num_rows // MIN_PER_LIST))


def _signs(vectors: Floats, *, rotate: bool) -> faiss.Index:
    dim = vectors.shape[1]
    index = faiss.IndexLSH(dim, dim, rotate, False)
    index.add(vectors)
    return index


def _flat(vectors: Floats) -> faiss.Index:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _build_lists(vectors: Floats, options: ShortlistOptions, codes: str, *, rotate: bool = False) -> faiss.Index:
    """An IVF index whose lists hold ``codes`` (in the words of faiss's factory); rotated, all dimensions make lists."""
    num_rows, dim = vectors.shape
    if num_rows < MIN_TRAINED:
        return _flat(vectors)
    nlist = choose_nlist(num_rows, options)
    rotation = f"RR{dim}," if rotate else ""
    index = faiss.index_factory(dim, f"{rotation}IVF{nlist},{codes}", faiss.METRIC_INNER_PRODUCT)
    sample = min(num_rows, max(MIN_TRAINED, nlist * options.train_per_list))
    rows = np.sort(np.random.default_rng(dim).choice(num_rows, sample, replace=False))
    if options.coarse_dim is not None and options.coarse_dim < dim and not rotate:
        index = _with_coarse_lists(index, vectors[rows], options.coarse_dim)
    index.train(vectors[rows])
    index.add(vectors)
    return index


def _with_coarse_lists(index: Any, sample: Floats, dim: int) -> faiss.Index:
    """The untrained IVF ``index`` with centroids of the first ``dim`` dimensions of ``sample``."""
    module: Any = faiss
    prefix = sample[:, :dim] / np.maximum(np.linalg.norm(sample[:, :dim], axis=1, keepdims=True), 1e-30)
    means = faiss.Kmeans(dim, index.nlist, spherical=True, niter=10, seed=dim)
    means.train(np.ascontiguousarray(prefix, np.float32))
    unit = module.IndexPreTransform(module.NormalizationTransform(dim, 2.0), module.IndexFlatIP(dim))
    quantiser = module.IndexPreTransform(module.RemapDimensionsTransform(index.d, dim, False), unit)
    centroids: Any = means.centroids
    quantiser.add(np.pad(centroids, ((0, 0), (0, index.d - dim))))
    own, index.quantizer, index.own_fields = index.quantizer, quantiser, False
    copy = faiss.deserialize_index(faiss.serialize_index(index))  # which owns all its parts
    index.quantizer, index.own_fields = own, True
    return copy


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
    """Open a saved index of type ``kind``; ``ArtifactError`` when it is missing, damaged or another's."""
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
        if isinstance(index, faiss.IndexPreTransform):
            self._inner = faiss.downcast_index(index.index)

    @classmethod
    def load(cls, path: str, *, num_rows: int, dim: int) -> "Shortlist":
        """Open a saved index through a memory map; ``ArtifactError`` when it is missing, damaged or another's."""
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
        """Whether its scores are the cosines of what it was built over: it stores the vectors themselves."""
        return isinstance(self.index, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))

    @property
    def nlist(self) -> int:
        """Lists of an IVF type, each with a centroid that every query is compared with; 0 for the others."""
        return int(self._inner.nlist) if isinstance(self._inner, faiss.IndexIVF) else 0

    @property
    def takes_filters(self) -> bool:
        """Whether :meth:`search` can leave rows out; those of a type that cannot are scanned instead."""
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
        """The ``k`` nearest (as the index type finds them) of unit-length ``queries`` [n, dim]; rows of the shard.

        Best first, but equal scores in any order: whoever makes an answer of them ranks them. An IVF type finds what
        the lists it looks into hold, which may be less than ``k``. With ``allowed``, other rows are passed over and the
        beam is wider by as much as there are fewer of them, and ``widen`` times wider again.
        """
        found = min(k, self.index.ntotal if allowed is None else allowed.num_rows)
        if not found or not len(queries):
            return empty_hits(len(queries), k)
        wider = widen * (1.0 if allowed is None else 1 / allowed.share)
        ef, probes = math.ceil((ef_search or found) * wider), math.ceil((nprobe or NPROBE) * wider)
        settings = self._settings(max(found, ef), probes, allowed)
        with faiss_threads():
            scores, rows = self.index.search(queries, found, params=settings)
        scores[rows < 0] = NO_SCORE
        return Hits(rows, scores)

    def _settings(self, ef: int, nprobe: int, allowed: Allowed | None) -> Any:
        module: Any = faiss  # its stubs do not know these classes' keywords
        only = {} if allowed is None else {"sel": allowed.selector}
        if self.is_graph:
            return module.SearchParametersHNSW(efSearch=ef, **only)
        if self.nlist:
            settings = module.SearchParametersIVF(nprobe=min(self.nlist, nprobe), **only)
            return module.SearchParametersPreTransform(index_params=settings) if self._turned else settings
        return module.SearchParameters(**only) if only else None


class Work(NamedTuple):
    """What searches have done."""

    distances: int
    """Distances that HNSW, or scores that the int8 graph, has computed."""
    listed: int
    """Rows in the lists that IVF has looked into."""


@contextmanager
def count_work() -> Iterator[Callable[[], Work]]:
    """Yields a function that tells what searches of this process have done in the block."""
    graph, lists = faiss.cvar.hnsw_stats, faiss.cvar.indexIVF_stats  # type: ignore[attr-defined]  # not in faiss's stubs
    before = Work(int(graph.ndis) + Graph.computed, int(lists.ndis))
    yield lambda: Work(int(graph.ndis) + Graph.computed - before.distances, int(lists.ndis) - before.listed)
