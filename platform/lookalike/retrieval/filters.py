"""Row filters: which rows of a shard an answer may hold, from metadata or as a mask.

An approximate index loses recall under a filter, a graph most of all: the walk passes over rows it may not return, and
when the allowed rows lie together and away from the query it does not meet them. So few allowed rows are gathered and
compared one by one, which is exact; only when there are many is the index asked, with a wider beam.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.errors import UsageError
from lookalike.retrieval.ranking import Mask, Rows

Conditions = Mapping[str, Sequence[str]]
"""{column: [values]}: rows whose column holds one of the values, for every column named."""
RowFilter = Conditions | Mask
"""Conditions over metadata columns, or one bool a row."""
Key = tuple[tuple[str, tuple[str, ...]], ...]
"""Conditions in one order, hashable."""
SCAN_ROWS = 2000
"""Allowed rows up to which they are scanned, whatever their share: 0.4 ms."""
SCAN_GRAPH, SCAN_LISTS = 20, 5
"""The allowed rows are scanned when their number times their share is at most this many times the rows wanted.

A scan costs about 80 ns a row. A walk of a graph meets about 12 / share nodes for each row wanted and so costs 1.6 us /
share: 20 scanned rows / share. Lists cost about a quarter of a graph. Measured by
``tests/benchmarks/retrieval_filters.py``."""
FILTERS_KEPT = 16
"""Evaluated conditions that a shard keeps: 1/8 byte a row each, and 8 bytes per allowed row where they are scanned."""


class Allowed:
    """The rows of a shard that may be found, from a mask [n]."""

    def __init__(self, mask: Mask) -> None:
        self.bits = np.packbits(mask, bitorder="little")
        """A bit a row, uint8, the lowest first."""
        self._size = len(mask)
        self.num_rows = int(mask.sum())

    @property
    def share(self) -> float:
        """Allowed rows among all, from 0 to 1."""
        return self.num_rows / max(1, self._size)

    def is_few(self, wanted: int, *, graph: bool) -> bool:
        """Whether a scan of the allowed rows is cheaper than asking a ``graph``, or lists, for ``wanted`` of them."""
        factor = SCAN_GRAPH if graph else SCAN_LISTS
        return self.num_rows <= SCAN_ROWS or self.num_rows * self.share <= factor * wanted

    @cached_property
    def rows(self) -> Rows:
        """The allowed rows, rising, int64."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self._size, bitorder="little")).astype(np.int64)

    @cached_property
    def selector(self) -> faiss.IDSelector:
        """The same for faiss."""
        return faiss.IDSelectorBitmap(self.bits)  # type: ignore[call-arg,arg-type]  # faiss's stubs know C++'s form


def check_mask(mask: Mask, num_rows: int) -> Mask:
    """``mask``, or ``UsageError`` unless it is bool [num_rows]."""
    if mask.dtype != np.bool_ or mask.shape != (num_rows,):
        raise UsageError(
            f"the row filter is {mask.dtype}{list(mask.shape)}; give bool[{num_rows}], one a row, or "
            "conditions such as {'view': ['icon']}"
        )
    return mask


def filter_key(conditions: Conditions, columns: Sequence[str]) -> Key:
    """``conditions`` in one order; ``UsageError`` for an unknown column, or values that are no list of strings."""
    for column, values in conditions.items():
        if column not in columns:
            raise UsageError(f"the filter names column {column!r}; the index has {', '.join(columns)}")
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise UsageError(f"the filter's values for {column!r} are {values!r}; give a list of strings")
    return tuple((column, tuple(sorted(set(values)))) for column, values in sorted(conditions.items()))


def match_rows(table: pa.Table, key: Key, live: Mask | None = None) -> Allowed:
    """The rows of ``table`` that meet every condition, of those that are ``live``; a null meets none."""
    mask = np.ones(len(table), bool) if live is None else live.copy()
    for column, values in key:
        found = pc.is_in(table[column], pa.array(values, table[column].type))
        mask &= found.to_numpy().astype(bool)
    return Allowed(mask)
