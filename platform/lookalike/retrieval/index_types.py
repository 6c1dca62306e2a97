"""Shortlist index types: each is a function from unit-length prefixes to a faiss index, found by name.

To add a type, register a builder. It must give the same bytes for the same vectors: builds use one thread, fixed seeds
and a seeded sample to train on. A name that begins with ``hnsw`` or ``graph`` takes a plan's ``ef_search``, a name that
begins with ``ivf`` its ``nprobe``.

| type | bytes per row (links and ids extra) | finds |
|---|---|---|
| ``flat`` | 4 per dimension | every row, exactly |
| ``hnsw`` | 4 per dimension, 8 per link | by walking a graph; ``ef_search`` |
| ``graph`` | 1 per dimension, 4, and 8 per link | by walking the lowest layer of that graph, in C; see ``graph.py`` |
| ``hnsw-sq8`` | 1 per dimension, 8 per link | like ``hnsw``, over 8-bit numbers |
| ``ivf`` | 4 per dimension, 8 for the id | in the ``nprobe`` nearest of ``nlist`` lists |
| ``ivf-pq`` | 1/2 per ``pq_dims`` dimensions, 8 | like ``ivf``, over 4-bit codes, in registers (fast-scan) |
| ``ivf-rabitq`` | ``rabitq_bits``/8 per dimension, 16 | like ``ivf``, over rotated sign bits with corrected scores |
| ``binary`` | 1/8 per dimension | every row, by Hamming distance of rotated sign bits |
| ``binary-signs`` | 1/8 per dimension | every row, by the prefix's own sign bits (tasks of kind ``binary``) |

A shard with fewer than ``MIN_TRAINED`` rows has too few to train codebooks with and nothing to gain: types that need
training are flat there.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import faiss
import numpy as np
from pydantic import Field

from lookalike.config import Config
from lookalike.registry import Registry
from lookalike.retrieval.graph import Graph, build_graph
from lookalike.retrieval.ranking import Floats

MIN_TRAINED = 1000
"""Fewest rows of a shard that codebooks are trained for."""
MIN_PER_LIST = 39
"""Fewest rows per list that k-means asks for; with fewer, lists would be noise."""
HNSW_M, EF_CONSTRUCTION = 32, 80
"""Default links and candidates of faiss's HNSW."""


class ShortlistOptions(Config):
    """Build settings of the index types; each type reads only its own."""

    hnsw_m: int | None = Field(default=None, ge=2, le=256)
    """Links per node and layer of a graph (twice as many on the lowest layer); default 16 for ``graph``, else 32."""
    ef_construction: int | None = Field(default=None, ge=4, le=4096)
    """Candidates considered for each vector added to a graph; default 120 for ``graph``, else 80."""
    nlist: int | None = Field(default=None, ge=1, le=1 << 20)
    """Lists of an IVF type; default 2 * sqrt(rows of the shard), and never more than rows / 39."""
    train_per_list: int = Field(default=64, ge=MIN_PER_LIST, le=4096)
    """Most rows per list that train centroids and codebooks: a seeded sample."""
    coarse_dim: int | None = Field(default=None, ge=1)
    """Dimensions that assign rows to the lists of ``ivf`` and ``ivf-pq``, if fewer than the shortlist's: lists by a
    short prefix, rows compared by a longer one (AdANNS, Rege et al. 2023). Default: all of the shortlist's."""
    pq_dims: int = Field(default=1, ge=1, le=64)
    """Dimensions that share one 4-bit code of ``ivf-pq``; lowered to a divisor of the prefix."""
    rabitq_bits: int = Field(default=1, ge=1, le=9)
    """Bits per dimension of ``ivf-rabitq``."""


SHORTLISTS: Registry[Callable[[Floats, ShortlistOptions], faiss.Index | Graph]] = Registry("shortlist")


@SHORTLISTS.register("flat")
def build_flat(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A scan over a copy of the prefixes: exact, and as large as they are."""
    return _flat(vectors)


@SHORTLISTS.register("hnsw")
def build_hnsw(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """A navigable graph (Malkov and Yashunin); the inner product of unit vectors is their cosine."""
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
    """The same graph over 8-bit numbers, each dimension between its smallest and largest value."""
    if len(vectors) < MIN_TRAINED:
        return _flat(vectors)
    eight_bits: Any = faiss.ScalarQuantizer.QT_8bit  # an int; faiss's stubs ask for another class
    index = faiss.IndexHNSWSQ(vectors.shape[1], eight_bits, options.hnsw_m or HNSW_M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction or EF_CONSTRUCTION
    index.train(vectors)  # two passes for the extremes: over all rows, so that none is clipped
    index.add(vectors)
    return index


@SHORTLISTS.register("ivf")
def build_ivf(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists by nearest centroid that hold the unchanged prefixes."""
    return _build_lists(vectors, options, "Flat")


@SHORTLISTS.register("ivf-pq")
def build_ivf_pq(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists of product-quantised prefixes (Jegou et al.), 4 bits per code so that tables fit registers. The codes are
    those of the prefixes, not of their residuals to a centroid, so one table serves all lists of a query."""
    dim = vectors.shape[1]
    share = max(size for size in range(1, min(options.pq_dims, dim) + 1) if dim % size == 0)
    return _build_lists(vectors, options, f"PQ{dim // share}x4fs")


@SHORTLISTS.register("ivf-rabitq")
def build_ivf_rabitq(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Lists of RaBitQ codes (Gao and Long) after the random rotation that their error bound needs."""
    bits = "" if options.rabitq_bits == 1 else str(options.rabitq_bits)
    return _build_lists(vectors, options, f"RaBitQfs{bits}", rotate=True)


@SHORTLISTS.register("binary")
def build_binary(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Sign bits of the rotated prefix (faiss fixes the seed), one per dimension; all are compared."""
    return _lsh(vectors, rotate=True)


@SHORTLISTS.register("binary-signs")
def build_binary_signs(vectors: Floats, options: ShortlistOptions) -> faiss.Index:
    """Sign bits of the unrotated prefix: the codes that a task of kind ``binary`` trained (Zhai and Wu 2019 binarise at
    zero too): 1 where ``x > 0``. A rotation would mix the trained dimensions."""
    return _lsh(strict_signs(vectors), rotate=False)


def effort_of(kind: str) -> Literal["ef_search", "nprobe"] | None:
    """The field of a plan that sets the search effort of a type, by the beginning of its name."""
    return "ef_search" if kind.startswith(("hnsw", "graph")) else "nprobe" if kind.startswith("ivf") else None


def choose_nlist(num_rows: int, options: ShortlistOptions) -> int:
    """Lists of an IVF type over ``num_rows``: the setting, or 2 * sqrt(n); at most n / 39, at least 1."""
    wanted = round(2 * math.sqrt(num_rows)) if options.nlist is None else options.nlist
    return max(1, min(wanted, num_rows // MIN_PER_LIST))


def strict_signs(vectors: Floats) -> Floats:
    """1 where ``vectors`` are above 0, else -1, float32: faiss packs ``x >= 0``, which makes exact zeros ones."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def _lsh(vectors: Floats, *, rotate: bool) -> faiss.Index:
    dim = vectors.shape[1]
    index = faiss.IndexLSH(dim, dim, rotate, False)
    index.add(vectors)
    return index


def _flat(vectors: Floats) -> faiss.Index:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _build_lists(vectors: Floats, options: ShortlistOptions, codes: str, *, rotate: bool = False) -> faiss.Index:
    """An IVF index whose lists hold ``codes`` (faiss's factory syntax); rotated, all dimensions assign the lists."""
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
    copy = faiss.deserialize_index(faiss.serialize_index(index))  # the copy owns all its parts
    index.quantizer, index.own_fields = own, True
    return copy
