"""The delta tier: writes that the index does not hold yet, searched with the shards they belong to.

For each generation a worker keeps the written rows of its hash shards, and the stored rows that were replaced or
deleted. Written rows are compared one by one, which is exact; compaction keeps them few.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.filters import FILTER_BYTES, FILTERS_KEPT, Conditions
from lookalike.retrieval.index_meta import IndexMeta, shard_of
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, empty_hits, from_keys, merge_hits, sort_keys
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.vectors import inverse_norms, normalise
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.ask import Ask

WRITTEN = 1 << 62
"""Global numbers of written rows begin here: behind all stored ones, in the order in which they were written."""
ROOM = 256
"""Written rows that there is room for at first."""
COPY = 20
"""Dot products with a row that cost as much as copying it."""
PLACES = 16
"""Bits of a written row's number that hold its place within its write."""


class RowContent(NamedTuple):
    """Id and columns of a written row."""

    image_id: str
    columns: dict[str, str]

    def read(self, name: str) -> str | None:
        """The value in a column, of which the id is one; None without it."""
        return self.image_id if name == "image_id" else self.columns.get(name)

    def meets(self, conditions: Conditions) -> bool:
        """Whether the row meets all conditions; a column that it lacks meets none."""
        return all(self.read(name) in values for name, values in conditions.items())


@dataclass(frozen=True)
class WrittenRows:
    """Written rows, and stored rows that they replace, at one moment.

    Arrays have a place for each row ever written, and room to grow.
    """

    dims: Sequence[int]
    alive: npt.NDArray[np.intp]
    """Places of the rows that were neither written again nor deleted, rising."""
    numbers: Rows
    """Global numbers int64 [m], rising."""
    vectors: Floats
    """float32 [m, dim], unit length."""
    lengths: Floats
    """Lengths of their prefixes, float32 [m, nested dims]."""
    entries: Sequence[RowContent]
    replaced: Sequence[Rows]
    """For each shard the rows (numbered within it, rising) that were replaced or deleted."""
    masks: dict[tuple[int, bytes], npt.NDArray[np.bool_]] = field(default_factory=dict)

    def search(self, ask: Ask) -> Hits:
        """The best written rows by cosine at the plan's re-rank dim: the exact answer."""
        queries, k, dim, keep = ask.queries, ask.k, ask.plan.rerank_dim, self._matching(ask.filters)
        if not len(keep):
            return empty_hits(len(queries), k)
        inverse = inverse_norms(self.lengths[keep, list(self.dims).index(dim)])
        scores = self._products(normalise(queries[:, :dim]), keep) * inverse
        keys = sort_keys(scores.astype(np.float32), np.arange(len(keep)))
        if keys.shape[1] > k:
            keys = np.partition(keys, k - 1, axis=1)[:, :k]
        keys.sort(axis=1)
        hits = from_keys(keys)
        return Hits(self.numbers[keep[hits.rows]], hits.scores)

    def _products(self, queries: Floats, keep: npt.NDArray[np.intp]) -> Floats:
        """Inner products [n, rows to ``keep``] of ``queries`` [n, dim], over all rows if that costs less."""
        num_rows, (num_queries, dim) = len(self.numbers), queries.shape
        if num_queries * num_rows <= (num_queries + COPY) * len(keep):
            return np.asarray((queries @ self.vectors[:num_rows, :dim].T)[:, keep])
        return np.asarray(queries @ self.vectors[keep, :dim].T)

    def _matching(self, conditions: Conditions) -> npt.NDArray[np.intp]:
        if not conditions:
            return self.alive
        return np.array([place for place in self.alive.tolist() if self.entries[place].meets(conditions)], np.intp)

    def search_stored(self, position: int, shard: ShardSearcher, ask: Ask) -> Hits:
        """The hits of ``shard`` among rows that were not replaced; ``position`` is its place in ``replaced``."""
        hits = shard.search(ask.queries, ask.k, ask.plan, ask.filters)
        gone = self._gone(position, shard, hits).any(axis=1)
        if gone.any():  # few answers hold replaced rows: only their queries are asked again
            mask = self._mask(position, shard, ask.filters)
            again = shard.search(ask.queries[gone], ask.k, ask.plan, mask)
            hits.rows[gone], hits.scores[gone] = again.rows, again.scores
        return hits

    def shortlist_stored(self, position: int, shard: ShardSearcher, ask: Ask) -> Hits:
        """The same for the first stage alone."""
        hits = shard.shortlist(ask.queries, ask.k, ask.plan, ask.filters)
        if self._gone(position, shard, hits).any():
            hits = shard.shortlist(ask.queries, ask.k, ask.plan, self._mask(position, shard, ask.filters))
        return hits

    def _gone(self, position: int, shard: ShardSearcher, hits: Hits) -> npt.NDArray[np.bool_]:
        local = np.where(hits.rows == NO_ROW, NO_ROW, hits.rows - shard.meta.row_offset)
        return np.isin(local, self.replaced[position])

    def _mask(self, position: int, shard: ShardSearcher, conditions: Conditions) -> npt.NDArray[np.bool_]:
        key = (position, blake2b(repr(sorted(conditions.items())).encode("utf-8", "surrogatepass")).digest())
        mask = self.masks.get(key)
        if mask is None:
            mask = shard.match(conditions)
            mask[self.replaced[position]] = False
            size = sum(each.nbytes for each in self.masks.copy().values()) + mask.nbytes
            if len(self.masks) >= FILTERS_KEPT * len(self.replaced) or size > FILTER_BYTES:
                self.masks.clear()
            self.masks[key] = mask
        return mask

    def read_columns(self, rows: Rows, names: Sequence[str]) -> list[list[str | None]]:
        """Values in some columns (the id is one) of written ``rows``, by global number."""
        entries = [self.entries[place] for place in np.searchsorted(self.numbers, rows).tolist()]
        return [[entry.read(name) for entry in entries] for name in names]


class Delta:
    """Changes that writes made to one generation's shards in one worker. Calls may come from several threads."""

    def __init__(self, meta: IndexMeta, shards: Sequence[ShardSearcher], group: int, num_groups: int) -> None:
        self._meta, self._shards, self._group, self._num_groups = meta, list(shards), group, num_groups
        self.last = 0
        """Number of the last write taken in."""
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}
        """Id -> place of its newest row; -1 for a deleted one."""
        self._numbers = np.empty(ROOM, np.int64)
        self._vectors = np.empty((ROOM, meta.dim), np.float32)
        self._lengths = np.empty((ROOM, len(meta.dims)), np.float32)
        self._entries: list[RowContent] = []
        self._replaced: list[Rows] = [np.empty(0, np.int64) for _ in shards]
        self._written: WrittenRows | None = None

    def apply(self, records: Sequence[WriteRecord]) -> None:
        """Take in writes, in order; writes taken in before are skipped."""
        with self._lock:
            replaced: list[list[int]] = [[] for _ in self._shards]
            for record in records:
                if record.number > self.last:
                    self._apply(record, replaced)
                    self.last = record.number
            for position, rows in enumerate(replaced):
                if rows:
                    self._replaced[position] = np.union1d(self._replaced[position], np.array(rows, np.int64))
            self._written = None

    def _apply(self, record: WriteRecord, replaced: list[list[int]]) -> None:
        message = record.message
        if isinstance(message, pb.DeleteRequest):
            for image_id in filter(self._owns, message.ids):
                self._replace(image_id, replaced)
                self._places[image_id] = -1
        elif message.model_fingerprint == self._meta.model_fingerprint:  # vectors of two models cannot be compared
            for place, row in enumerate(message.rows):
                if self._owns(row.id):
                    self._replace(row.id, replaced)
                    self._append(WRITTEN + (record.number << PLACES) + place, row)

    def _owns(self, image_id: str) -> bool:
        return shard_of(image_id, self._meta.num_hash_shards) % self._num_groups == self._group

    def _replace(self, image_id: str, replaced: list[list[int]]) -> None:
        if image_id not in self._places:  # otherwise it was replaced before
            for shard, rows in zip(self._shards, replaced, strict=True):
                if (row := shard.find(image_id)) >= 0:
                    rows.append(row - shard.meta.row_offset)

    def _append(self, number: int, row: pb.Row) -> None:
        place = len(self._entries)
        if place == len(self._numbers):  # copies, since a search may still read the old arrays
            self._numbers, self._vectors = _double(self._numbers), _double(self._vectors)
            self._lengths = _double(self._lengths)
        unit = normalise(np.frombuffer(row.vector, "<f4").astype(np.float32)[None])[0]
        squares = np.cumsum(np.square(unit, dtype=np.float64))
        self._numbers[place], self._vectors[place] = number, unit
        self._lengths[place] = np.sqrt(squares[np.array(self._meta.dims) - 1])
        self._entries.append(RowContent(row.id, dict(row.metadata)))
        self._places[row.id] = place

    def written(self) -> WrittenRows | None:
        """The rows written so far; None if there was no write."""
        with self._lock:
            if not self._places:
                return None
            if self._written is None:
                places = np.fromiter(self._places.values(), np.intp, len(self._places))
                alive, numbers = np.sort(places[places >= 0]), self._numbers[: len(self._entries)]
                self._written = WrittenRows(
                    self._meta.dims, alive, numbers, self._vectors, self._lengths, self._entries, tuple(self._replaced)
                )
            return self._written

    def find(self, image_id: str) -> Floats | None:
        """The written vector of an id; empty if the id was deleted, None if it was not written."""
        with self._lock:
            place = self._places.get(image_id)
            return None if place is None else self._vectors[place] if place >= 0 else np.zeros(0, np.float32)


def _double(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([array, np.empty_like(array)])


def search_all(shards: Sequence[ShardSearcher], written: WrittenRows | None, ask: Ask) -> Hits:
    """The best of stored and written rows together."""
    if written is None:
        parts = [shard.search(ask.queries, ask.k, ask.plan, ask.filters) for shard in shards]
    else:
        parts = [written.search_stored(place, shard, ask) for place, shard in enumerate(shards)]
        parts.append(written.search(ask))
    return parts[0] if len(parts) == 1 else merge_hits(parts, ask.k)


def shortlist_all(shards: Sequence[ShardSearcher], written: WrittenRows | None, ask: Ask) -> Hits:
    """The candidates among stored rows of all shards, side by side."""
    parts = [
        shard.shortlist(ask.queries, ask.k, ask.plan, ask.filters)
        if written is None
        else written.shortlist_stored(place, shard, ask)
        for place, shard in enumerate(shards)
    ]
    return Hits(np.hstack([hits.rows for hits in parts]), np.hstack([hits.scores for hits in parts]))
