"""Search in one shard: its prefix store, and its shortlist indexes, opened when first used."""

import bisect
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from math import inf
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.retrieval.filters import (
    Allowed,
    Conditions,
    FilterCache,
    RowFilter,
    check_mask,
    filter_key,
    match_rows,
)
from lookalike.retrieval.graph import Graph
from lookalike.retrieval.native import Steps
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Mask, empty_hits, top_k
from lookalike.retrieval.rerank import extend, pack_plan_steps, rerank, scan
from lookalike.retrieval.shard_meta import ShardMeta
from lookalike.retrieval.shortlist import Shortlist, load_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.vectors import check_queries, normalise

RETRY_WIDER = 8
"""Factor of the beam when a filtered search is repeated because it met too few allowed rows."""
NEARLY_ALL = 0.8
"""Share of allowed rows above which a walk meets as many of them as without a filter, as after a few deletes."""
PLANS_KEPT = 64
"""Plans whose steps a shard keeps packed for the C library."""
ENOUGH = 4
"""Allowed rows that a walk must meet for each row wanted; with fewer it may have missed the region they lie in."""


class ShardSearcher:
    """One shard, opened for search."""

    def __init__(self, store: PrefixStore, copy: "tempfile.TemporaryDirectory[str] | None" = None) -> None:
        self.store = store
        self._copy = copy  # of a remote shard; removed with this object
        self._shortlists: dict[int, Shortlist | Graph] = {}
        self._steps: Callable[[Plan, int], Steps] = lru_cache(PLANS_KEPT)(
            lambda plan, k: pack_plan_steps(store, plan.list_steps(k))
        )
        live = store.live
        self._all = None if live is None else Allowed(live)
        self._filters = FilterCache(lambda key: match_rows(store.table, key, live))

    @classmethod
    def open(cls, uri: str) -> "ShardSearcher":
        """Open a shard folder; a remote shard is first copied to local disk, because it is memory-mapped.

        Raises ``ArtifactError`` if a file is missing or contradicts ``shard.json``.
        """
        if storage.is_local(uri):
            return cls(PrefixStore.open(storage.local_path(uri)))
        copy = tempfile.TemporaryDirectory(prefix="lookalike-shard-")
        filesystem, path = storage.resolve(uri)
        for name in storage.list_files(uri):
            filesystem.get_file(f"{path}/{name}", f"{copy.name}/{name}")
        return cls(PrefixStore.open(copy.name), copy)

    @property
    def meta(self) -> ShardMeta:
        """Content of the shard's ``shard.json``."""
        return self.store.meta

    @property
    def num_live(self) -> int:
        """Rows that are not deleted."""
        return self.meta.num_rows if self._all is None else self._all.num_rows

    def load(self, dims: Sequence[int] | None = None) -> None:
        """Open the shortlist indexes over ``dims`` (default: all) now, so that no query waits for it."""
        for dim in self.meta.shortlist_dims if dims is None else dims:
            self.index_over(dim)

    def index_over(self, dim: int) -> Shortlist | Graph:
        """The shortlist index over the first ``dim`` dimensions; ``UsageError`` if there is none."""
        if dim not in self.meta.shortlist_dims:
            raise UsageError(
                f"no shortlist index over {dim}-d in {self.store.folder}; it has {list(self.meta.shortlist_dims)}: "
                "take one of these, a scan, or build it"
            )
        if dim not in self._shortlists:
            path = f"{self.store.folder}/{shortlist_name(dim, self.meta.shortlist)}"
            self._shortlists[dim] = load_shortlist(self.meta.shortlist, path, num_rows=self.meta.num_rows, dim=dim)
        return self._shortlists[dim]

    def search(self, queries: npt.ArrayLike, k: int, plan: Plan, allowed: RowFilter | None = None) -> Hits:
        """The ``k`` best rows of the shard for ``queries`` float32 [n, dim] of any length, as ``plan`` finds them.

        ``allowed`` limits the answer to some rows: conditions such as {"view": ["icon"]}, or bool [rows of the shard].
        """
        vectors, only = self._checked(queries, k, plan), self._allowed(allowed)
        if only is None and not plan.scan and self.meta.num_rows and self.store.native is not None:
            index = self.index_over(plan.shortlist_dim)
            if _is_native(index):
                wanted = min(max(k, plan.shortlist_k), self.meta.num_rows)
                hits = index.search_store(
                    self.store.native, vectors, wanted, self._steps(plan, k), k, ef_search=plan.ef_search
                )
                return _shift(hits, self.meta.row_offset)
        return self._rank(vectors, self._find(vectors, k, plan, only), k, plan)

    def shortlist(self, queries: npt.ArrayLike, k: int, plan: Plan, allowed: RowFilter | None = None) -> Hits:
        """The first stage: max(K, k) global rows per query with their cosines at the shortlist dim, in any order.

        The cosines are those of the stored values: if the index keeps only codes, the prefixes are read here.
        """
        return self._find(self._checked(queries, k, plan), k, plan, self._allowed(allowed))

    def rerank(self, queries: npt.ArrayLike, shortlist: Hits, k: int, plan: Plan) -> Hits:
        """The other stages: the best ``k`` global rows of ``shortlist``, which this shard made, by cosine at D_r."""
        vectors = self._checked(queries, k, plan)
        if shortlist.rows.shape != shortlist.scores.shape or len(shortlist.rows) != len(vectors):
            raise UsageError(
                f"{len(vectors)} queries came with a shortlist of {shortlist.rows.shape} rows and "
                f"{shortlist.scores.shape} scores; send one line per query"
            )
        return self._rank(vectors, shortlist, k, plan)

    def match(self, conditions: Conditions | None) -> Mask:
        """Rows that are not deleted and meet the ``conditions``, bool [n]."""
        allowed = self._allowed(conditions)
        if allowed is None:
            return np.ones(self.meta.num_rows, bool)
        return np.unpackbits(allowed.bits, count=self.meta.num_rows, bitorder="little").astype(bool)

    def find(self, image_id: str) -> int:
        """Global row of a stored id, -1 if it is not here or deleted; rows are sorted by id."""
        local = bisect.bisect_left(range(self.meta.num_rows), image_id, key=lambda row: self._ids[row].as_py())
        is_here = local < self.meta.num_rows and self._ids[local].as_py() == image_id
        is_here = is_here and (self.store.live is None or bool(self.store.live[local]))
        return local + self.meta.row_offset if is_here else NO_ROW

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self.store.table["image_id"]

    def _checked(self, queries: npt.ArrayLike, k: int, plan: Plan) -> Floats:
        if k < 1:
            raise UsageError(f"k is {k}; ask for at least 1 result")
        plan.require_dims(self.meta.dims)
        return check_queries(queries, self.meta.dim)

    def _allowed(self, rows: RowFilter | None) -> Allowed | None:
        live = self.store.live
        if isinstance(rows, np.ndarray):
            mask = check_mask(rows, self.meta.num_rows)
            return Allowed(mask if live is None else mask & live)
        return self._filters.find(filter_key(rows, self.store.table.column_names)) if rows else self._all

    def _find(self, vectors: Floats, k: int, plan: Plan, allowed: Allowed | None) -> Hits:
        wanted = min(max(k, plan.shortlist_k), self.meta.num_rows if allowed is None else allowed.num_rows)
        if not wanted:
            return empty_hits(len(vectors), k)
        if plan.scan:
            hits = scan(self.store, vectors, wanted, plan.shortlist_dim, None if allowed is None else allowed.rows)
        elif allowed is None:
            hits = self._find_all(vectors, wanted, min(k, wanted), plan)
        else:
            hits = self._find_allowed(vectors, wanted, plan, allowed)
        return _shift(hits, self.meta.row_offset)

    def _find_all(self, vectors: Floats, wanted: int, least: int, plan: Plan) -> Hits:
        """Search the index; search all IVF lists for the queries whose lists held fewer than ``least`` rows."""
        hits, nlist = self._search_index(vectors, wanted, plan), self.index_over(plan.shortlist_dim).nlist
        short = np.flatnonzero(hits.rows[:, least - 1] == NO_ROW)
        if nlist and len(short):
            hits.rows[short], hits.scores[short] = self._search_index(vectors[short], wanted, plan, widen=nlist)
        return hits

    def _find_allowed(self, vectors: Floats, wanted: int, plan: Plan, allowed: Allowed) -> Hits:
        """Search the index; repeat with a wider beam for queries that met too few allowed rows; scan for the rest.

        Few are met if the filter removes a query's neighbours, as a filter by class does.
        """
        index, result = self.index_over(plan.shortlist_dim), empty_hits(len(vectors), wanted)
        short = np.arange(len(vectors))
        if index.takes_filters and not allowed.is_few(wanted, graph=index.is_graph):
            spread = index.is_graph and allowed.share < NEARLY_ALL
            to_meet = min(wanted * (ENOUGH if spread else 1), allowed.num_rows)
            ef = max(wanted, plan.ef_search or 0)
            for widen in (1, RETRY_WIDER):
                hits = self._search_index(vectors[short], to_meet, plan, ef=ef, allowed=allowed, widen=widen)
                result.rows[short], result.scores[short] = top_k(*hits, wanted)
                short = short[(hits.rows == NO_ROW).any(axis=1)]
        if len(short):
            hits = scan(self.store, vectors[short], wanted, plan.shortlist_dim, allowed.rows)
            result.rows[short], result.scores[short] = hits
        return result

    def _search_index(
        self,
        vectors: Floats,
        wanted: int,
        plan: Plan,
        *,
        ef: int | None = None,
        allowed: Allowed | None = None,
        widen: int = 1,
    ) -> Hits:
        """Hits of the index with their cosines at its dim."""
        index, ef = self.index_over(plan.shortlist_dim), ef or plan.ef_search
        if _is_native(index) and self.store.native is not None:
            steps = pack_plan_steps(self.store, [(plan.shortlist_dim, wanted, inf)])
            return index.search_store(
                self.store.native, vectors, wanted, steps, wanted, ef_search=ef, allowed=allowed, widen=widen
            )
        prefix = normalise(np.ascontiguousarray(vectors[:, : plan.shortlist_dim]))
        hits = index.search(prefix, wanted, ef_search=ef, nprobe=plan.nprobe, allowed=allowed, widen=widen)
        return hits if index.is_exact else extend(self.store, vectors, hits, 0, plan.shortlist_dim)

    def _rank(self, vectors: Floats, shortlist: Hits, k: int, plan: Plan) -> Hits:
        if not self.meta.num_rows:
            return empty_hits(len(vectors), k)
        local = _shift(shortlist, -self.meta.row_offset)
        if local.rows.size and (local.rows.max() >= self.meta.num_rows or local.rows.min() < NO_ROW):
            raise UsageError(
                f"the shortlist holds rows outside this shard's {self.meta.num_rows} from "
                f"{self.meta.row_offset}; send each shard its own"
            )
        return _shift(rerank(self.store, vectors, local, k, plan), self.meta.row_offset)


def _is_native(index: Shortlist | Graph) -> TypeGuard[Graph]:
    """Whether the C library searches the index, and re-ranks in the same call."""
    return isinstance(index, Graph) and index.native is not None


def _shift(hits: Hits, offset: int) -> Hits:
    return Hits(np.where(hits.rows == NO_ROW, NO_ROW, hits.rows + offset), hits.scores) if offset else hits
