"""Search over all shards of an index artifact, in this process. The service wraps this object."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike.arguments import check_array, check_text, check_whole, list_texts, names_checked, show
from lookalike.artifacts import Artifact
from lookalike.errors import ArgumentError, ArtifactError, UsageError
from lookalike.retrieval.array_index import index_array
from lookalike.retrieval.filters import RowFilter, check_filter, check_mask
from lookalike.retrieval.index_meta import INDEX_META, IndexMeta, read_index_meta
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, merge_hits
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.vectors import check_queries

MAX_K = 1_000_000
"""Most results of one query."""


class Searcher:
    """All shards of an index, in one process.

    Methods raise ``UsageError`` for values that the index refuses and, before any work, ``ArgumentError`` for arguments
    of the wrong type or name.
    """

    def __init__(self, meta: IndexMeta, shards: Sequence[ShardSearcher]) -> None:
        self.meta, self.shards = meta, list(shards)
        opened = [(shard.meta.num_rows, shard.meta.row_offset) for shard in shards]
        if opened != list(zip(meta.shard_rows, meta.offsets, strict=True)):
            raise ArtifactError(
                f"shards hold {opened} (rows, offset) where {INDEX_META} says {meta.shard_rows}; build the index again"
            )

    @classmethod
    def open(cls, uri: str, *, check: bool = True) -> "Searcher":
        """Open a published index; ``check`` compares its files with the manifest first."""
        artifact = Artifact.open(check_text("uri", uri, "give the URI of an index as str"), "index", check=check)
        meta = read_index_meta(artifact)
        return cls(meta, [ShardSearcher.open(artifact.path(name)) for name in meta.shards])

    @classmethod
    @names_checked
    def of(
        cls,
        vectors: npt.ArrayLike,
        ids: str | Sequence[str] | None = None,
        columns: Mapping[str, Sequence[str | None]] | None = None,
        *,
        dims: Sequence[int] | None = None,
        shortlist: str | None = None,
    ) -> "Searcher":
        """Search over an array [n, D]; rows of the answers are rows of the array. Without a ``plan`` it is exact.

        ``ids`` are texts, by default the rows' numbers; ``columns`` are texts to filter by. With ``shortlist``, such as
        ``graph``, an index is built over each of the nested ``dims`` but the last, D, for plans that use it. The
        vectors are copied into a temporary folder, which goes with the object.
        """
        names = None if ids is None else list_texts("ids", ids, "a list of texts")
        meta, shard = index_array(vectors, names, columns, dims=dims, shortlist=shortlist)
        return cls(meta, [shard])

    @names_checked
    def search(
        self,
        queries: npt.ArrayLike,
        k: int,
        plan: Plan | None = None,
        allowed: RowFilter | None = None,
        *,
        num_threads: int = 1,
    ) -> Hits:
        """The ``k`` best rows of all shards for ``queries`` float32 [n, dim]; without a plan, the exact answer.

        ``allowed`` limits the answer to some rows: conditions such as {"view": ["icon"]}, or bool [rows of the index].
        ``num_threads`` divides a batch over threads and does not change the answer. ``k`` is at most ``MAX_K``.
        """
        if (k := check_whole("k", k)) > MAX_K:
            raise UsageError(f"k={show(k)} is more than {MAX_K}; ask for fewer results")
        if plan is not None and not isinstance(plan, Plan):
            raise ArgumentError(f"plan is {show(plan)}; give a lookalike.retrieval.plan.Plan, or None for exact search")
        if (num_threads := check_whole("num_threads", num_threads)) < 1:
            raise UsageError(f"num_threads={num_threads} is less than 1; give 1 or more")
        plan, allowed = plan or Plan.exact(self.meta.dim), check_filter(allowed)
        if num_threads > 1 and len(vectors := check_queries(queries, self.meta.dim)) > 1:
            shares = np.array_split(vectors, min(num_threads, len(vectors)))
            with ThreadPoolExecutor(len(shares)) as pool:
                answers = list(pool.map(lambda share: self.search(share, k, plan, allowed), shares))
            return Hits(np.vstack([hits.rows for hits in answers]), np.vstack([hits.scores for hits in answers]))
        filters: list[RowFilter | None] = [allowed] * len(self.shards)
        if isinstance(allowed, np.ndarray):
            filters = list(np.split(check_mask(allowed, self.meta.num_rows), self.meta.offsets[1:]))
        parts = [shard.search(queries, k, plan, own) for shard, own in zip(self.shards, filters, strict=True)]
        return parts[0] if len(parts) == 1 else merge_hits(parts, k)

    @names_checked
    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """The stored id of each global row; ``""`` for -1."""
        return [item.get("image_id", "") for item in self._lookup(rows, ["image_id"])]

    @names_checked
    def metadata(self, rows: npt.ArrayLike) -> list[dict[str, str]]:
        """The stored columns of each global row, nulls left out; empty for -1."""
        return self._lookup(rows, list(self.meta.columns))

    @names_checked
    def find(self, ids: str | Sequence[str]) -> Rows:
        """Global row of each stored id, -1 for an unknown id; one id counts as a list of one."""
        names = list_texts("ids", ids, "an id as str, or a list of them")
        rows = [max(self.shards[n].find(name) for n in self.meta.segments_of(name)) for name in names]
        return np.asarray(rows, dtype=np.int64)

    @names_checked
    def vectors(self, rows: npt.ArrayLike) -> Floats:
        """The stored vectors of global rows, float32 [n, dim], unit length."""
        wanted = self._checked(rows)
        result = np.empty((len(wanted), self.meta.dim), np.float32)
        for shard, places in self._by_shard(wanted):
            result[places] = shard.store.read(wanted[places] - shard.meta.row_offset)
        if (wanted == NO_ROW).any():
            raise UsageError("row -1 stands for no hit and has no vector; leave it out")
        return result

    @names_checked
    def column(self, name: str) -> list[Any]:
        """One metadata column of all rows, in the order of global rows, deleted rows included."""
        if check_text("name", name) not in self.meta.columns:
            raise UsageError(f"the index has no column {show(name)}; it has {', '.join(self.meta.columns)}")
        return [value for shard in self.shards for value in shard.store.table[name].to_pylist()]

    def _checked(self, rows: npt.ArrayLike) -> Rows:
        given = check_array("rows", rows)
        if given.size and (given.dtype.kind == "f" or given.dtype == np.uint64):
            raise ArgumentError(f"rows are numbers of {given.dtype}; give whole numbers, as int64")
        wanted = given.astype(np.int64).ravel()
        if wanted.size and not NO_ROW <= wanted.min() <= wanted.max() < self.meta.num_rows:
            raise UsageError(
                f"rows {wanted.min()} to {wanted.max()} are outside the index, which has rows 0 to "
                f"{self.meta.num_rows - 1}"
            )
        return wanted

    def _by_shard(self, rows: Rows) -> list[tuple[ShardSearcher, npt.NDArray[np.intp]]]:
        """(shard, places in ``rows`` that it owns) for every shard."""
        owners = np.searchsorted(np.asarray(self.meta.offsets), rows, side="right") - 1
        return [(shard, np.flatnonzero((owners == n) & (rows != NO_ROW))) for n, shard in enumerate(self.shards)]

    def _lookup(self, rows: npt.ArrayLike, columns: list[str]) -> list[dict[str, str]]:
        wanted = self._checked(rows)
        result: list[dict[str, str]] = [{} for _ in wanted]
        for shard, places in self._by_shard(wanted):
            if len(places):
                records = shard.store.read_rows(wanted[places] - shard.meta.row_offset, columns)
                for place, record in zip(places, records, strict=True):
                    result[place] = record
        return result
