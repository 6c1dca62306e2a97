"""Row filters: the rows of a shard that an answer may contain, given by metadata or as a mask.

An approximate index loses recall under a filter, a graph most of all: its walk skips rows that it may not return, and
it never meets allowed rows that lie together and far from the query. So a few allowed rows are compared one by one,
which is exact; only if there are many is the index searched, with a wider beam.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.arguments import check_text, list_texts, show
from lookalike.errors import ArgumentError, UsageError
from lookalike.retrieval.ranking import Mask, Rows

Conditions = Mapping[str, Sequence[str]]
"""{column: [values]}: rows whose value is in the list, for every column named; ``check_filter`` makes them."""
RowFilter = Conditions | Mask
"""Conditions over metadata columns, or one bool per row."""
Key = tuple[tuple[str, tuple[str, ...]], ...]
"""Conditions in canonical order, hashable."""
SCAN_ROWS = 2000
"""This many allowed rows are always scanned, in 0.4 ms, whatever their share."""
SCAN_GRAPH, SCAN_LISTS = 20, 5
"""More allowed rows are scanned if their number times their share is at most this many times the rows wanted.

A scan costs about 80 ns per row. A walk of a graph meets about 12 / share nodes per row wanted and so costs 1.6 us /
share: 20 scanned rows / share. Lists cost about a quarter of a graph. Measured by
``tests/benchmarks/retrieval_filters.py``."""
FILTERS_KEPT, FILTER_BYTES = 16, 64 << 20
"""Evaluated filters that a shard caches, and bytes of all of them: 1/8 byte per row, 8 bytes per allowed row if it is
scanned, and their conditions. A larger one is evaluated each time."""
VALUE_BYTES = 60
"""Memory of a value besides its characters."""


class FilterCache:
    """The last filters, at most ``FILTERS_KEPT`` and ``FILTER_BYTES``. Calls may come from several threads."""

    def __init__(self, evaluate: Callable[[Key], "Allowed"]) -> None:
        self._evaluate, self._lock = evaluate, threading.Lock()
        self._kept: OrderedDict[Key, Allowed] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes of the filters that are kept."""
        return sum(_key_bytes(key) + allowed.size_bytes for key, allowed in self._kept.items())

    def find(self, key: Key) -> "Allowed":
        """The rows that meet ``key``, from the cache if they are there."""
        with self._lock:
            if (allowed := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return allowed
        allowed = self._evaluate(key)
        with self._lock:
            self._kept[key] = allowed
            while len(self._kept) > FILTERS_KEPT or self.size_bytes > FILTER_BYTES:
                self._kept.popitem(last=False)
        return allowed


def _key_bytes(key: Key) -> int:
    return sum(VALUE_BYTES + 4 * len(value) for _, values in key for value in values)


class Allowed:
    """The rows of a shard that an answer may contain, from a mask [n]."""

    def __init__(self, mask: Mask) -> None:
        self.bits = np.packbits(mask, bitorder="little")
        """One bit per row, uint8, lowest bit first."""
        self._size = len(mask)
        self.num_rows = int(mask.sum())

    @property
    def share(self) -> float:
        """Share of all rows that is allowed, 0 to 1."""
        return self.num_rows / max(1, self._size)

    def is_few(self, wanted: int, *, graph: bool) -> bool:
        """Whether scanning the allowed rows is cheaper than finding ``wanted`` of them by a ``graph``, or by lists."""
        factor = SCAN_GRAPH if graph else SCAN_LISTS
        return self.num_rows <= SCAN_ROWS or self.num_rows * self.share <= factor * wanted

    @property
    def size_bytes(self) -> int:
        """Bytes of its arrays, which grow when its rows are listed."""
        return self.bits.nbytes + 8 * self.num_rows * ("rows" in self.__dict__)

    @cached_property
    def rows(self) -> Rows:
        """The allowed rows in ascending order, int64."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self._size, bitorder="little")).astype(np.int64)

    @cached_property
    def selector(self) -> faiss.IDSelector:
        """The same rows for faiss."""
        return faiss.IDSelectorBitmap(self.bits)  # type: ignore[call-arg,arg-type]  # faiss's stubs have the C++ form


def check_filter(rows: RowFilter | None) -> RowFilter | None:
    """Return a caller's filter with lists of values; a bare str is the one value of its column."""
    if rows is None or isinstance(rows, np.ndarray):
        return rows
    if not isinstance(rows, Mapping):
        raise ArgumentError(
            f"the row filter is {show(rows)}; give conditions such as {{'view': ['icon']}}, or an array of bool"
        )
    return {
        check_text("a column of the filter", column): list_texts(
            f"the filter's {show(column)}", values, "a str or a list of str"
        )
        for column, values in rows.items()
    }


def check_mask(mask: Mask, num_rows: int) -> Mask:
    """``mask``; ``UsageError`` unless it is bool [num_rows]."""
    if mask.dtype != np.bool_ or mask.shape != (num_rows,):
        raise UsageError(
            f"the row filter is {mask.dtype}{list(mask.shape)}; give bool[{num_rows}], one per row, or "
            "conditions such as {'view': ['icon']}"
        )
    return mask


def filter_key(conditions: Conditions, columns: Sequence[str]) -> Key:
    """``conditions`` in canonical order; ``UsageError`` for an unknown column, or values that are not strings."""
    for column, values in conditions.items():
        if column not in columns:
            raise UsageError(f"the filter names column {column!r}; the index has {', '.join(columns)}")
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise UsageError(f"the filter's values for {column!r} are {values!r}; give a list of strings")
    return tuple((column, tuple(sorted(set(values)))) for column, values in sorted(conditions.items()))


def match_rows(table: pa.Table, key: Key, live: Mask | None = None) -> Allowed:
    """The ``live`` rows of ``table`` that meet every condition; a null meets none."""
    mask = np.ones(len(table), bool) if live is None else live.copy()
    for column, values in key:
        matches = pc.is_in(table[column], pa.array(values, table[column].type))
        mask &= matches.to_numpy().astype(bool)
    return Allowed(mask)
