"""Search over an index artifact, in this process: one object per shard, one over all shards.

Serving wraps these objects, so what is served is what is tested here.
"""

import bisect
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from math import inf
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.filters import (
    FILTERS_KEPT,
    Allowed,
    Conditions,
    Key,
    Mask,
    RowFilter,
    check_mask,
    filter_key,
    match_rows,
)
from lookalike.retrieval.graph import Graph
from lookalike.retrieval.index_meta import INDEX_META, IndexMeta, read_index_meta
from lookalike.retrieval.native import Steps
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, empty_hits, merge_hits, top_k
from lookalike.retrieval.rerank import extend, pack_plan_steps, rerank, scan
from lookalike.retrieval.shortlist import Shortlist, load_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore, ShardMeta, check_queries, normalise

RETRY_WIDER = 8
"""How much wider the beam is when a filtered search met too few allowed rows."""
NEARLY_ALL = 0.8
"""Share of allowed rows from which on a graph's walk meets as many of them as without a filter: few are deleted."""
PLANS_KEPT = 64
"""Plans whose steps a shard keeps packed for the C library."""
ENOUGH = 4
"""Allowed rows for each one wanted that a graph's walk must meet: with fewer it has grazed where they lie."""


class ShardSearcher:
    """One shard: its prefix store, and its shortlist indexes opened when first asked for."""

    def __init__(self, store: PrefixStore, copy: "tempfile.TemporaryDirectory[str] | None" = None) -> None:
        self.store = store
        self._copy = copy  # of a remote shard; lives as long as this object
        self._shortlists: dict[int, Shortlist | Graph] = {}
        self._steps: Callable[[Plan, int], Steps] = lru_cache(PLANS_KEPT)(
            lambda plan, k: pack_plan_steps(store, plan.list_steps(k))
        )
        live = store.live
        self._all = None if live is None else Allowed(live)
        self._matching: Callable[[Key], Allowed] = lru_cache(FILTERS_KEPT)(
            lambda key: match_rows(store.table, key, live)
        )

    @classmethod
    def open(cls, uri: str) -> "ShardSearcher":
        """Open a shard folder; a remote one is copied to local disk first, because it is memory-mapped.

        Raises ``ArtifactError`` when a file is missing or is not what ``shard.json`` says.
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
        """What the shard holds."""
        return self.store.meta

    def load(self, dims: Sequence[int] | None = None) -> None:
        """Open the shortlist indexes over ``dims`` (all by default) now, so that no query waits for it."""
        for dim in self.meta.shortlist_dims if dims is None else dims:
            self.index_over(dim)

    def index_over(self, dim: int) -> Shortlist | Graph:
        """The shortlist index over the first ``dim`` dimensions; ``UsageError`` when there is none."""
        if dim not in self.meta.shortlist_dims:
            raise UsageError(
                f"no shortlist index over {dim}-d in {self.store.folder}; it has "
                f"{list(self.meta.shortlist_dims)}: take one of these, a scan, or build it"
            )
        if dim not in self._shortlists:
            path = f"{self.store.folder}/{shortlist_name(dim, self.meta.shortlist)}"
            self._shortlists[dim] = load_shortlist(self.meta.shortlist, path, num_rows=self.meta.num_rows, dim=dim)
        return self._shortlists[dim]

    def shortlist(self, queries: npt.ArrayLike, k: int, plan: Plan, allowed: RowFilter | None = None) -> Hits:
        """The first stage: max(K, k) global rows per query with their cosines at the shortlist dim, in any order.

        The cosines are those of the stored values whatever the index keeps: where it keeps codes, the shortlist's
        prefixes are read here.
        """
        return self._find(self._checked(queries, k, plan), k, plan, self._allowed(allowed))

    def _allowed(self, rows: RowFilter | None) -> Allowed | None:
        live = self.store.live
        if isinstance(rows, np.ndarray):
            mask = check_mask(rows, self.meta.num_rows)
            return Allowed(mask if live is None else mask & live)
        return self._matching(filter_key(rows, self.store.table.column_names)) if rows else self._all

    def match(self, conditions: Conditions | None) -> Mask:
        """Which rows are not deleted and meet the ``conditions``, bool [n]."""
        allowed = self._allowed(conditions)
        if allowed is None:
            return np.ones(self.meta.num_rows, bool)
        return np.unpackbits(allowed.bits, count=self.meta.num_rows, bitorder="little").astype(bool)

    def _find(self, vectors: Floats, k: int, plan: Plan, allowed: Allowed | None) -> Hits:
        wanted = min(max(k, plan.shortlist_k), self.meta.num_rows if allowed is None else allowed.num_rows)
        if not wanted:
            return empty_hits(len(vectors), k)
        if plan.scan:
            found = scan(self.store, vectors, wanted, plan.shortlist_dim, None if allowed is None else allowed.rows)
        elif allowed is None:
            found = self._find_lists(vectors, wanted, min(k, wanted), plan)
        else:
            found = self._find_allowed(vectors, wanted, plan, allowed)
        return _shift(found, self.meta.row_offset)

    def _find_lists(self, vectors: Floats, wanted: int, least: int, plan: Plan) -> Hits:
        """Ask the index; look into all lists for queries whose lists held fewer rows than the ``least`` asked for."""
        found, nlist = self._ask(vectors, wanted, plan), self.index_over(plan.shortlist_dim).nlist
        short = np.flatnonzero(found.rows[:, least - 1] == NO_ROW)
        if nlist and len(short):
            found.rows[short], found.scores[short] = self._ask(vectors[short], wanted, plan, widen=nlist)
        return found

    def _ask(
        self,
        vectors: Floats,
        wanted: int,
        plan: Plan,
        *,
        ef: int | None = None,
        allowed: Allowed | None = None,
        widen: int = 1,
    ) -> Hits:
        """What the index finds, with cosines at its dim."""
        index = self.index_over(plan.shortlist_dim)
        if _walks(index) and self.store.native is not None:
            steps = pack_plan_steps(self.store, [(plan.shortlist_dim, wanted, inf)])
            return index.search_store(
                self.store.native,
                vectors,
                wanted,
                steps,
                wanted,
                ef_search=ef or plan.ef_search,
                allowed=allowed,
                widen=widen,
            )
        prefix = normalise(np.ascontiguousarray(vectors[:, : plan.shortlist_dim]))
        found = index.search(
            prefix, wanted, ef_search=ef or plan.ef_search, nprobe=plan.nprobe, allowed=allowed, widen=widen
        )
        return found if index.is_exact else extend(self.store, vectors, found, 0, plan.shortlist_dim)

    def _find_allowed(self, vectors: Floats, wanted: int, plan: Plan, allowed: Allowed) -> Hits:
        """Ask the index; ask again, with a wider beam, for queries that met too few allowed rows; scan for the rest.

        Such queries are those whose neighbours the filter takes away, as one by class does.
        """
        index, found = self.index_over(plan.shortlist_dim), empty_hits(len(vectors), wanted)
        short = np.arange(len(vectors))
        if index.takes_filters and not allowed.is_few(wanted, graph=index.is_graph):
            spread = index.is_graph and allowed.share < NEARLY_ALL
            asked = min(wanted * (ENOUGH if spread else 1), allowed.num_rows)
            ef = max(wanted, plan.ef_search or 0)
            for widen in (1, RETRY_WIDER):
                hits = self._ask(vectors[short], asked, plan, ef=ef, allowed=allowed, widen=widen)
                found.rows[short], found.scores[short] = top_k(*hits, wanted)
                short = short[(hits.rows == NO_ROW).any(axis=1)]
        if len(short):
            hits = scan(self.store, vectors[short], wanted, plan.shortlist_dim, allowed.rows)
            found.rows[short], found.scores[short] = hits
        return found

    def rerank(self, queries: npt.ArrayLike, shortlist: Hits, k: int, plan: Plan) -> Hits:
        """The other stages: ``k`` global rows of ``shortlist``, which came from this shard, by cosine at D_r."""
        vectors = self._checked(queries, k, plan)
        if shortlist.rows.shape != shortlist.scores.shape or len(shortlist.rows) != len(vectors):
            raise UsageError(
                f"{len(vectors)} queries came with a shortlist of {shortlist.rows.shape} rows and "
                f"{shortlist.scores.shape} scores; send one line a query"
            )
        return self._rank(vectors, shortlist, k, plan)

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

    def search(self, queries: npt.ArrayLike, k: int, plan: Plan, allowed: RowFilter | None = None) -> Hits:
        """The ``k`` best of the shard for ``queries`` float32 [n, dim], of any length, as ``plan`` finds them.

        ``allowed`` keeps the answer to some rows: conditions such as {"view": ["icon"]}, or bool [rows of the shard].
        """
        vectors, only = self._checked(queries, k, plan), self._allowed(allowed)
        if only is None and not plan.scan and self.meta.num_rows and self.store.native is not None:
            index = self.index_over(plan.shortlist_dim)
            if _walks(index):
                wanted = min(max(k, plan.shortlist_k), self.meta.num_rows)
                hits = index.search_store(
                    self.store.native, vectors, wanted, self._steps(plan, k), k, ef_search=plan.ef_search
                )
                return _shift(hits, self.meta.row_offset)
        return self._rank(vectors, self._find(vectors, k, plan, only), k, plan)

    def _checked(self, queries: npt.ArrayLike, k: int, plan: Plan) -> Floats:
        if k < 1:
            raise UsageError(f"k is {k}; ask for at least 1 result")
        plan.require_dims(self.meta.dims)
        return check_queries(queries, self.meta.dim)

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self.store.table["image_id"]

    def find(self, image_id: str) -> int:
        """Global row of a stored id, -1 when it is not here or deleted; rows are sorted by id."""
        local = bisect.bisect_left(range(self.meta.num_rows), image_id, key=lambda row: self._ids[row].as_py())
        found = local < self.meta.num_rows and self._ids[local].as_py() == image_id
        found = found and (self.store.live is None or bool(self.store.live[local]))
        return local + self.meta.row_offset if found else NO_ROW


def _walks(index: Shortlist | Graph) -> TypeGuard[Graph]:
    """Whether the C library walks it, and re-ranks in the same call."""
    return isinstance(index, Graph) and index.native is not None


def _shift(hits: Hits, offset: int) -> Hits:
    return Hits(np.where(hits.rows == NO_ROW, NO_ROW, hits.rows + offset), hits.scores) if offset else hits


class Searcher:
    """All shards of an index, in one process."""

    def __init__(self, meta: IndexMeta, shards: Sequence[ShardSearcher]) -> None:
        self.meta, self.shards = meta, list(shards)
        found = [(shard.meta.num_rows, shard.meta.row_offset) for shard in shards]
        if found != list(zip(meta.shard_rows, meta.offsets, strict=True)):
            raise ArtifactError(
                f"shards hold {found} (rows, offset) where {INDEX_META} says {meta.shard_rows}; build the index again"
            )

    @classmethod
    def open(cls, uri: str, *, check: bool = True) -> "Searcher":
        """Open a published index; ``check`` compares its files with the manifest first."""
        artifact = Artifact.open(uri, "index", check=check)
        meta = read_index_meta(artifact)
        return cls(meta, [ShardSearcher.open(artifact.path(name)) for name in meta.shards])

    def search(
        self,
        queries: npt.ArrayLike,
        k: int,
        plan: Plan | None = None,
        allowed: RowFilter | None = None,
        *,
        num_threads: int = 1,
    ) -> Hits:
        """The ``k`` best of all shards for ``queries`` float32 [n, dim]; without a plan, the exact answer.

        ``allowed`` keeps the answer to some rows: conditions such as {"view": ["icon"]}, or bool [rows of the index].
        A batch may be shared out over ``num_threads``; the answer is the same.
        """
        plan = plan or Plan.exact(self.meta.dim)
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

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """The stored id of each global row; ``""`` for -1."""
        return [item.get("image_id", "") for item in self._lookup(rows, ["image_id"])]

    def metadata(self, rows: npt.ArrayLike) -> list[dict[str, str]]:
        """The stored columns of each global row, nulls left out; empty for -1."""
        return self._lookup(rows, list(self.meta.columns))

    def find(self, ids: Sequence[str]) -> Rows:
        """Global row of each stored id, -1 for an unknown one."""
        found = [max(self.shards[n].find(name) for n in self.meta.segments_of(name)) for name in ids]
        return np.asarray(found, dtype=np.int64)

    def vectors(self, rows: npt.ArrayLike) -> Floats:
        """The stored vectors of global rows, float32 [n, dim], unit length."""
        wanted = self._checked(rows)
        result = np.empty((len(wanted), self.meta.dim), np.float32)
        for shard, places in self._by_shard(wanted):
            result[places] = shard.store.read(wanted[places] - shard.meta.row_offset)
        if (wanted == NO_ROW).any():
            raise UsageError("row -1 stands for no hit and has no vector; leave it out")
        return result

    def _checked(self, rows: npt.ArrayLike) -> Rows:
        wanted = np.asarray(rows, dtype=np.int64).ravel()
        if wanted.size and not NO_ROW <= wanted.min() <= wanted.max() < self.meta.num_rows:
            raise UsageError(
                f"rows {wanted.min()} to {wanted.max()} are outside the index, which has rows 0 to "
                f"{self.meta.num_rows - 1}"
            )
        return wanted

    def _by_shard(self, rows: Rows) -> list[tuple[ShardSearcher, npt.NDArray[np.intp]]]:
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

    def column(self, name: str) -> list[Any]:
        """One metadata column of all rows, in the order of global rows, deleted ones included."""
        if name not in self.meta.columns:
            raise UsageError(f"the index has no column {name!r}; it has {', '.join(self.meta.columns)}")
        return [value for shard in self.shards for value in shard.store.table[name].to_pylist()]
