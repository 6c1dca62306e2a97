"""The inner loops of retrieval in C (``_native.c``), as functions on arrays; their callers have numpy twins.

The library is built with the package if there is a C compiler; ``AVAILABLE`` says whether it was. Without it faiss and
numpy give the same answers, several times slower. Calls release the GIL and use one thread, so several threads may
answer queries side by side.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.ranking import Floats, Hits

Codes = npt.NDArray[np.int8]
Steps = ctypes.Array[Any]
"""Made by :func:`pack_steps`."""
Bits = npt.NDArray[np.uint8]
_DTYPES = {"float32": 0, "float16": 1, "int8": 2}


class _Graph(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "links", "entries")] + [
        ("num_rows", ctypes.c_int64),
        ("dim", ctypes.c_int32),
        ("degree", ctypes.c_int32),
        ("num_entries", ctypes.c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [("stop", ctypes.c_int32), ("keep", ctypes.c_int32), ("margin", ctypes.c_float)]


class _Store(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("blocks", "widths", "strides", "scales", "norms")] + [
        ("num_rows", ctypes.c_int64),
        ("num_blocks", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("dim", ctypes.c_int32),
    ]


def _load() -> ctypes.CDLL | None:
    try:
        from lookalike.retrieval import _native  # type: ignore[attr-defined]
    except ImportError:
        return None
    library = ctypes.CDLL(_native.__file__)
    for name, arguments, result in (
        ("graph_search", "pp i ii pp pp", ctypes.c_int64),
        ("rerank", "pp i pp ii p ii pp", ctypes.c_int32),
        ("search", "ppp i ii pp p ii pp", ctypes.c_int64),
        ("scan", "pp ii p i pp", ctypes.c_int64),
        ("reach", "p i l p p", ctypes.c_int64),
        ("portable", "i", ctypes.c_int32),
    ):
        function = getattr(library, f"lookalike_{name}")
        types = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64}
        function.argtypes = [types[letter] for letter in arguments.replace(" ", "")]
        function.restype = result
    return library


_library = _load()
AVAILABLE = _library is not None
"""Whether the C library was built with this package."""


def _call(name: str, *arguments: Any) -> int:
    assert _library is not None, "check AVAILABLE first"
    plain = [value.__array_interface__["data"][0] if isinstance(value, np.ndarray) else value for value in arguments]
    result = int(getattr(_library, f"lookalike_{name}")(*plain))
    if result < 0:
        raise MemoryError(f"no memory for {name}")
    return result


def _new_hits(num_queries: int, k: int) -> Hits:
    """Memory for the library's answer."""
    return Hits(np.empty((num_queries, k), np.int64), np.empty((num_queries, k), np.float32))


def use_portable(on: bool) -> None:
    """Run the code for any processor, or again the code for this one; for tests."""
    _call("portable", int(on))


def pack_rows(allowed: npt.NDArray[np.bool_]) -> Bits:
    """``allowed`` bool [n] as the filter of these functions: one bit per row, lowest bit first."""
    return np.packbits(allowed, bitorder="little")


class NativeGraph:
    """Search of a graph over int8 codes.

    ``codes`` int8 [n, d] without -128, ``scales`` float32 [n], ``links`` int32 [n, degree] padded with -1, ``entries``
    int32 [m]; all C-contiguous. This object keeps them alive. A row's score is its integer product with the query times
    its scale.
    """

    def __init__(self, codes: Codes, scales: Floats, links: npt.NDArray[np.int32], entries: npt.NDArray[np.int32]):
        self._arrays = (codes, scales, links, entries)
        self.num_rows, self.dim = codes.shape
        self._graph = _Graph(
            *(array.ctypes.data for array in self._arrays), self.num_rows, self.dim, links.shape[1], len(entries)
        )
        self.address = ctypes.addressof(self._graph)
        self._threads = threading.local()

    @property
    def marks(self) -> int:
        """Address of the calling thread's memory for searches."""
        if not hasattr(self._threads, "marks"):
            arrays = np.zeros(self.num_rows // 8 + 1, np.uint8), np.empty(self.num_rows, np.int32)
            self._threads.arrays = arrays
            self._threads.marks = (ctypes.c_void_p * 2)(*(array.ctypes.data for array in arrays))
        return ctypes.addressof(self._threads.marks)

    def search(self, queries: Codes, ef: int, keep: int, allowed: Bits | None = None) -> tuple[Hits, int]:
        """(the best ``keep`` of the ``ef`` rows found for int8 ``queries`` [m, d], scores computed)."""
        hits, most = _new_hits(len(queries), keep), max(ef, keep)
        return hits, _call("graph_search", self.address, queries, len(queries), most, keep, allowed, self.marks, *hits)


def reach(links: npt.NDArray[np.int32], start: int, reached: Bits, stack: npt.NDArray[np.int32]) -> int:
    """Mark in ``reached`` uint8 [n] the rows that ``links`` int32 [n, degree] lead to; return how many are new."""
    return _call("reach", links, links.shape[1], start, reached, stack)


def pack_steps(steps: Sequence[tuple[int, int, float]]) -> Steps:
    """The steps of a re-rank for the library, each (blocks read so far, rows kept, margin below the k-th cosine)."""
    return (_Step * len(steps))(*(_Step(*step) for step in steps))


class NativeStore:
    """Re-rank and scan of a prefix store: its blocks [n, width] of one dtype, and norms float32 [blocks, n].

    Blocks may be slices of wider arrays; neighbouring slices are read together. Each int8 block has ``scales`` float32
    [n], the same array for blocks read together.
    """

    def __init__(
        self, blocks: Sequence[npt.NDArray[Any]], norms: Floats, dtype: str, scales: Sequence[Floats | None] = ()
    ) -> None:
        self._widths = np.array([block.shape[1] for block in blocks], np.int32)
        self._strides = np.array([block.strides[0] for block in blocks], np.int64)
        self._pointers = (ctypes.c_void_p * len(blocks))(*(block.ctypes.data for block in blocks))
        addresses = [0 if factors is None else factors.ctypes.data for factors in scales or [None] * len(blocks)]
        self._scales = (ctypes.c_void_p * len(blocks))(*addresses)
        self._arrays = (*blocks, norms, *scales)
        self._store = _Store(
            ctypes.addressof(self._pointers),
            self._widths.ctypes.data,
            self._strides.ctypes.data,
            ctypes.addressof(self._scales),
            norms.ctypes.data,
            norms.shape[1],
            len(blocks),
            _DTYPES[dtype],
            int(self._widths.sum()),
        )
        self._address = ctypes.addressof(self._store)

    def rerank(self, queries: Floats, candidates: Hits, first_block: int, steps: Steps, k: int) -> Hits:
        """Funnel ``candidates`` [m, c] of ``queries`` float32 [m, dim] through ``steps``.

        Their scores are cosines at the end of block ``first_block`` - 1; ignored if ``first_block`` is 0.
        """
        pairs = np.ascontiguousarray(candidates.rows), np.ascontiguousarray(candidates.scores, dtype=np.float32)
        hits, width = _new_hits(len(queries), k), pairs[0].shape[1]
        funnel = first_block, steps, len(steps), k
        _call("rerank", self._address, queries, len(queries), *pairs, width, *funnel, *hits)
        return hits

    def search(  # noqa: PLR0917  # in the order of the C function
        self, graph: NativeGraph, queries: Floats, ef: int, keep: int, steps: Steps, k: int, allowed: Bits | None = None
    ) -> tuple[Hits, int]:
        """(the best ``keep`` of the ``ef`` rows that ``graph`` finds for ``queries`` float32 [m, dim], after ``steps``;
        scores that the graph computed)."""
        hits, walk = _new_hits(len(queries), k), (max(ef, keep), keep, allowed, graph.marks)
        inputs = graph.address, self._address, queries, len(queries)
        return hits, _call("search", *inputs, *walk, steps, len(steps), k, *hits)

    def scan(self, queries: Floats, num_blocks: int, k: int, allowed: Bits | None = None) -> tuple[Hits, int]:
        """(the exact ``k`` best rows by cosine at the end of block ``num_blocks`` - 1, numbers read)."""
        hits = _new_hits(len(queries), k)
        return hits, _call("scan", self._address, queries, len(queries), num_blocks, allowed, k, *hits)
