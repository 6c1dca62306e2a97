"""A graph over int8 prefixes: the graph with the smallest memory, 4 + d + 8 * M bytes per row.

The links are those of HNSW's lowest layer (Malkov and Yashunin 2018), built by faiss over the float32 prefixes. A
search touches less memory than in HNSW: a row's prefix is d bytes, scaled by its own largest number, so a hop at 128
dimensions costs two cache lines rather than eight, fetched while others are scored. Instead of descending through the
upper layers, a search starts at all rows of one of them, about sqrt(n), and at one row of every part of the graph that
no link leads to (HNSW leaves such parts if rows recur many times), so that every row can be found.

Scores are cosines of the codes, about 1e-2 from the true cosine; the caller reads the stored prefix for an answer.
"""

import math
import os
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from lookalike.errors import ArtifactError
from lookalike.retrieval import native
from lookalike.retrieval.filters import Allowed
from lookalike.retrieval.native import Bits, Codes, NativeGraph, NativeStore, Steps
from lookalike.retrieval.ranking import Floats, Hits, empty_hits, from_keys, pad_hits, sort_keys
from lookalike.retrieval.shard_meta import explained
from lookalike.retrieval.vectors import quantise, row_slices
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
Ints = npt.NDArray[np.int32]
ALIGNED = 64
"""Arrays begin at multiples of this many bytes, in the file and in memory."""
ARRAYS = {"codes": np.int8, "scales": np.float32, "links": np.int32, "entries": np.int32}
SCAN_ROWS = 1 << 14
"""Rows scored at a time without the C library."""


def build_graph(vectors: Floats, *, hnsw_m: int, ef_construction: int) -> "Graph":
    """The graph over unit-length ``vectors`` float32 [n, d]; deterministic with one faiss thread."""
    codes, scales = quantise(vectors)
    if not len(vectors):
        return Graph(codes, scales, np.empty((0, 2 * hnsw_m), np.int32), np.empty(0, np.int32))
    index = faiss.IndexHNSWFlat(vectors.shape[1], hnsw_m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    index.add(vectors)
    layers: Any = index.hnsw  # faiss's stubs lack its parts
    levels = faiss.vector_to_array(layers.levels)
    offsets = faiss.vector_to_array(layers.offsets)[:-1].astype(np.int64)
    neighbours = faiss.vector_to_array(layers.neighbors)
    links = np.empty((len(offsets), 2 * hnsw_m), np.int32)
    for part in row_slices(len(offsets), SCAN_ROWS):  # in parts: positions take 8 bytes each
        links[part] = neighbours[offsets[part, None] + np.arange(2 * hnsw_m)]
    return Graph(codes, scales, links, _entries(links, levels))


def _entries(links: Ints, levels: npt.NDArray[np.int32]) -> Ints:
    """Rows at which a search begins: the largest layer of at most sqrt(n) rows, and a row of each part out of reach."""
    most = max(1, math.isqrt(len(levels)))
    level = next(
        height
        for height in range(1, int(levels.max()) + 2)
        if (levels >= height).sum() <= most or height == levels.max()
    )
    entries = np.flatnonzero(levels >= level)[:most].astype(np.int32)
    reached = _reach(links, entries)
    lost = []
    for row in np.flatnonzero(reached == 0):
        if not reached[row]:
            lost.append(row)
            _reach(links, np.array([row], np.int32), reached)
    return np.concatenate([entries, np.array(lost, np.int32)])


def _reach(links: Ints, starts: Ints, reached: Bits | None = None) -> Bits:
    """Mark all rows that links lead to from ``starts``, uint8 [n]."""
    reached = np.zeros(len(links), np.uint8) if reached is None else reached
    if native.AVAILABLE:
        stack = np.empty(len(links), np.int32)
        for start in starts:
            native.reach(links, int(start), reached, stack)
        return reached
    front = starts[reached[starts] == 0]
    reached[front] = 1
    while len(front):
        near = np.unique(links[front])
        near = near[near >= 0]
        front = near[reached[near] == 0]
        reached[front] = 1
    return reached


class Graph:
    """A graph over one prefix of one shard."""

    is_exact, is_graph, takes_filters, nlist = False, True, True, 0
    computed = 0
    """Scores computed so far by all searches of this process."""

    def __init__(self, codes: Codes, scales: Floats, links: Ints, entries: Ints) -> None:
        self.codes, self.scales, self.links, self.entries = codes, scales, links, entries
        self.native = NativeGraph(codes, scales, links, entries) if native.AVAILABLE else None

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.codes)

    def save(self, path: str) -> None:
        """Write the four arrays to one file, each in numpy's format."""
        with open(path, "wb") as file:
            for name in ARRAYS:
                file.write(bytes(-file.tell() % ALIGNED))
                np.lib.format.write_array(file, getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, path: str, *, num_rows: int, dim: int) -> "Graph":
        """Read a saved graph; ``ArtifactError`` if it is missing, damaged or of another shard.

        Read, not mapped: a walk touches rows everywhere, and allocated memory has large pages.
        """
        codes, scales, links, entries = _read_arrays(path)
        shapes = codes.shape, scales.shape, links.shape[:1]
        if shapes != ((num_rows, dim), (num_rows,), (num_rows,)) or links.ndim != 2 or entries.ndim != 1:
            raise ArtifactError(
                f"{path} indexes {codes.shape} codes and {links.shape} links where {num_rows} rows of "
                f"{dim}-d are expected; build the index again"
            )
        for name, array in (("links", links), ("entries", entries)):
            if array.size and not -1 <= int(array.min()) <= int(array.max()) < num_rows:
                raise ArtifactError(f"{path} has {name} to rows that do not exist; build the index again")
        if not native.AVAILABLE and num_rows > SCAN_ROWS:
            log.warning(
                "slow %s",
                fields(
                    index=path,
                    reason="without the C library all codes are scanned",
                    remedy="install with a C compiler, or build shortlist=hnsw",
                ),
            )
        return cls(codes, scales, links, entries)

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
        """Like ``Shortlist.search``: the ``k`` nearest rows to unit-length ``queries`` float32 [n, d] a walk finds.

        Scores are cosines of the codes. ``nprobe`` is ignored.
        """
        wanted = min(k, self.num_rows if allowed is None else allowed.num_rows)
        if not wanted or not len(queries):
            return empty_hits(len(queries), k)
        codes, scales = quantise(queries)
        if self.native is None:
            hits = self._scan(codes, wanted, None if allowed is None else allowed.bits)
        else:
            ef = self._beam(wanted, ef_search, allowed, widen)
            hits, computed = self.native.search(codes, ef, wanted, None if allowed is None else allowed.bits)
            Graph.computed += computed
        return Hits(hits.rows, hits.scores * scales[:, None])

    def search_store(
        self,
        store: NativeStore,
        queries: Floats,
        wanted: int,
        steps: Steps,
        k: int,
        *,
        ef_search: int | None = None,
        allowed: Allowed | None = None,
        widen: int = 1,
    ) -> Hits:
        """:meth:`search` for ``wanted`` rows and their re-rank through ``steps`` to ``k``, in one call of the library.

        ``queries`` are float32 [n, dim of the store]. The same answer as two calls, in less time.
        """
        assert self.native is not None, "check native.AVAILABLE first"
        ef, bits = self._beam(wanted, ef_search, allowed, widen), None if allowed is None else allowed.bits
        hits, computed = store.search(self.native, queries, ef, wanted, steps, k, bits)
        Graph.computed += computed
        return hits

    def _beam(self, wanted: int, ef_search: int | None, allowed: Allowed | None, widen: int) -> int:
        wider = widen * (1.0 if allowed is None else 1 / allowed.share)
        return min(self.num_rows, max(wanted, math.ceil((ef_search or wanted) * wider)))

    def _scan(self, queries: Codes, keep: int, allowed: Bits | None) -> Hits:
        """Search without the C library: score all codes."""
        best = np.empty((len(queries), 0), np.uint64)
        floats = queries.astype(np.float32)  # sums of int8 products are exact in float32 up to 1,000 dimensions
        rows = np.arange(self.num_rows)
        if allowed is not None:
            rows = np.flatnonzero(np.unpackbits(allowed, count=self.num_rows, bitorder="little"))
        for part in row_slices(len(rows), SCAN_ROWS):
            some = rows[part]
            scores = (floats @ self.codes[some].astype(np.float32).T) * self.scales[some]
            best = np.hstack([best, sort_keys(scores, some)])
            best = np.sort(best, axis=1)[:, :keep]
        return pad_hits(from_keys(best), keep)


def _empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array that begins at a cache line, so that a row spans as few of them as possible."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_arrays(path: str) -> list[npt.NDArray[Any]]:
    arrays: list[npt.NDArray[Any]] = []
    with explained(path), open(path, "rb") as file:
        for dtype in ARRAYS.values():
            file.seek(-file.tell() % ALIGNED, os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, column_major, stored = np.lib.format.read_array_header_1_0(file)
            if column_major or stored != dtype:
                raise ValueError(f"{stored} where {np.dtype(dtype)} belongs")
            arrays.append(_empty(shape, dtype))
            if file.readinto(arrays[-1].reshape(-1).view(np.uint8).data) != arrays[-1].nbytes:
                raise ValueError("it ends too early")
    return arrays
