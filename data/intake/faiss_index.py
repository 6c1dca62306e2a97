"""Index files of FAISS that store whole vectors: flat, and IVF over flat lists, with or without a map of ids."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lookalike import storage
from lookalike.data.intake.files import FORMATS, Piece, VectorFile, Where
from lookalike.entries import escaped
from lookalike.errors import UsageError

IDS = "id"


class FaissFile(VectorFile):
    """The vectors of an index in the order of their ids if these count them, else in the order in which they lie."""

    kind = "float32"

    def __init__(self, uri: str, where: Where, work: str | None) -> None:
        super().__init__(uri)
        if not storage.is_local(uri):
            raise UsageError(f"{escaped(uri)}: an index of FAISS is read from a disk only; copy it to one")
        self._owner = _read(uri)
        self._index, ids = _unwrap(self._owner, uri)
        self.num_rows, self.dim = int(self._index.ntotal), int(self._index.d)
        self._ids = ids
        if ids is not None:
            self.id_column, self.columns = IDS, (IDS,)
        import faiss

        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            self.note = "its metric is a distance, and here vectors are compared by cosine"

    def pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        for first in range(start, stop, rows):
            num = min(rows, stop - first)
            table = None if self._ids is None else pa.table({IDS: pa.array(self._ids[first : first + num])})
            yield Piece(self._index.reconstruct_n(first, num), {}, table)


for _ending in ("faiss", "index"):
    FORMATS.register(_ending)(FaissFile)


def _read(uri: str) -> Any:
    import faiss

    try:
        return faiss.read_index(storage.local_path(uri), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[-1][:200]
        raise UsageError(f"{escaped(uri)} is not a whole index of FAISS ({told}); write it with write_index") from None


def _unwrap(index: Any, uri: str) -> tuple[Any, Any]:
    """(index that reconstructs its rows by place, ids of the places or None); the first one must be kept alive."""
    import faiss

    ids = None
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        ids = faiss.vector_to_array(index.id_map)
        index = faiss.downcast_index(index.index)
    if type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP, faiss.IndexFlat1D):
        return index, ids
    if type(index) is faiss.IndexIVFFlat:
        return _order_lists(index, ids)
    raise UsageError(
        f"{escaped(uri)} is a {type(index).__name__}, which keeps vectors in a compressed or other form; give an "
        "IndexFlat or IndexIVFFlat (below an IndexIDMap if it has ids), or the vectors it was built from"
    )


def _order_lists(index: Any, ids: Any) -> tuple[Any, Any]:
    """An IVF index and the ids of its places; own ids that only count the vectors are none."""

    lists = index.invlists
    own = [_list_ids(lists, number) for number in range(index.nlist)]
    flat = np.concatenate([*own, np.empty(0, np.int64)])
    if np.array_equal(np.sort(flat), np.arange(len(flat))):
        index.make_direct_map()
        return index, ids
    return _Lists(index), flat


def _list_ids(lists: Any, number: int) -> Any:
    import faiss

    size = lists.list_size(number)
    return faiss.rev_swig_ptr(lists.get_ids(number), size).copy() if size else np.empty(0, np.int64)


class _Lists:
    """The vectors of an IVF index in the order of its lists."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.ntotal, self.d, self.metric_type = index.ntotal, index.d, index.metric_type
        sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def reconstruct_n(self, first: int, num: int) -> Any:
        """``num`` vectors float32 [num, dim] from place ``first`` on."""
        import faiss

        parts, place = [], first
        while place < first + num:
            number = int(np.searchsorted(self._ends, place, side="right"))
            begin = int(self._ends[number - 1]) if number else 0
            stop = min(first + num, int(self._ends[number]))
            size = self._index.invlists.list_size(number)
            codes = faiss.rev_swig_ptr(self._index.invlists.get_codes(number), size * self._index.code_size)
            vectors = codes.view(np.float32).reshape(size, self.d)
            parts.append(vectors[place - begin : stop - begin].copy())
            place = stop
        return np.concatenate(parts) if parts else np.empty((0, self.d), np.float32)
