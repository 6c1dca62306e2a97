"""The workers of an index: one for each group of shards, the re-ranker. Bytes in, bytes out; a Serve deployment is such
a class as it is.

A worker holds one generation or, while one takes over from another, several; every call names the generation it is
for, so no answer mixes two. Computing happens in a thread, so that a replica's event loop keeps answering health checks
and other requests.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Hits, empty_hits, merge_hits
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.journal import Record
from lookalike.serve.search.delta import WRITTEN, Ask, Delta, Written, search_all, shortlist_all
from lookalike.serve.wire.answers import Answer, Column, Entry, Packed, compose, occurring_rows, pack, read_hits, unpack
from lookalike.serve.wire.errors import not_loaded

Shortlisted = tuple[bytes, bytes, Packed | None]
"""Rows (int64) and scores (float32) of a group's shortlists, and the hits among written rows, if there are any."""
WARM_UP = 8
"""Searches that a worker makes by itself before it is asked."""


class Opened(NamedTuple):
    """One generation in one worker."""

    shards: list[ShardSearcher]
    delta: Delta


class ShardWorker(Follows):
    """One group of shards: shortlist and re-rank of their own rows, and what was written of them since."""

    packs = True
    """Whether what ``search`` found leaves the process."""

    def __init__(self, group: int, num_groups: int, generations: Sequence[Generation], writer: Any = None) -> None:
        self._group, self._num_groups, self.writer = group, num_groups, writer
        self._held: dict[str, Opened] = {}
        for generation in generations:
            self.add(generation, self.open(generation))

    def open(self, generation: Generation) -> Opened:
        """Open the group's shards of ``generation``, with their shortlists, and touch what a search touches."""
        shards = [ShardSearcher.open(uri) for uri in generation.folders(self._group, self._num_groups)]
        for shard in shards:
            shard.load()
            warm_up(shard, generation.plans.default)
        return Opened(shards, Delta(generation.meta, shards, self._group, self._num_groups))

    def add(self, generation: Generation, opened: Opened) -> None:
        """Answer for an opened generation from now on."""
        self._held[generation.name] = opened

    def drop(self, name: str) -> None:
        """Let go of a generation; searches under way keep what they use."""
        self._held.pop(name, None)

    def apply(self, opened: Opened, records: Sequence[Record]) -> None:
        """Take in writes that ``opened`` does not hold."""
        opened.delta.apply(records)

    def _opened(self, generation: str) -> Opened:
        if generation not in self._held:
            raise not_loaded(generation, self._held)
        return self._held[generation]

    async def search(self, generation: str, queries: bytes, k: int, plan: str, filters: str) -> Packed | Answer:
        """The group's ``k`` best rows for float32 [n, dim] ``queries``; ``plan`` and ``filters`` are JSON."""
        opened = self._opened(generation)
        return await asyncio.to_thread(self._search, opened, queries, k, plan, filters)

    def _search(self, opened: Opened, queries: bytes, k: int, plan: str, filters: str) -> Packed | Answer:
        shards, written = opened.shards, opened.delta.written()
        ask = Ask(_vectors(queries, opened.delta.dim), k, Plan.model_validate_json(plan), json.loads(filters))
        hits = search_all(shards, written, ask)
        names = column_names(shards)
        columns = read_columns(shards, names, occurring_rows(hits), written)
        return (pack if self.packs else compose)(hits, names, columns)

    async def shortlist(self, generation: str, queries: bytes, k: int, plan: str, filters: str) -> Shortlisted:
        """The group's candidates, for the re-ranker."""
        opened = self._opened(generation)
        return await asyncio.to_thread(self._shortlist, opened, queries, k, plan, filters)

    def _shortlist(self, opened: Opened, queries: bytes, k: int, plan: str, filters: str) -> Shortlisted:
        written = opened.delta.written()
        ask = Ask(_vectors(queries, opened.delta.dim), k, Plan.model_validate_json(plan), json.loads(filters))
        found, final = shortlist_all(opened.shards, written, ask), None
        if written is not None:
            hits, names = written.search(ask), column_names(opened.shards)
            final = pack(hits, names, written.read_columns(occurring_rows(hits), names))
        return found.rows.astype("<i8").tobytes(), found.scores.astype("<f4").tobytes(), final

    async def vectors(self, generation: str, image_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored vectors of those ids that this group holds."""
        return await asyncio.to_thread(self._stored, self._opened(generation), image_ids)

    def _stored(self, opened: Opened, image_ids: Sequence[str]) -> dict[str, bytes]:
        written = {image_id: vector for image_id in image_ids if (vector := opened.delta.find(image_id)) is not None}
        found = {image_id: vector.astype("<f4").tobytes() for image_id, vector in written.items() if len(vector)}
        for shard in opened.shards:
            rows = {
                image_id: row
                for image_id in image_ids
                if image_id not in written and (row := shard.find(image_id)) >= 0
            }
            local = np.fromiter(rows.values(), np.int64, len(rows)) - shard.meta.row_offset
            vectors = shard.store.read(local)
            found |= {image_id: vector.astype("<f4").tobytes() for image_id, vector in zip(rows, vectors, strict=True)}
        return found


class LocalShardWorker(ShardWorker):
    """The same for a caller in this process."""

    packs = False


class RerankWorker(Follows):
    """Re-ranks the candidates of all groups, each shard's with its own rows, and merges them."""

    def __init__(self, generations: Sequence[Generation], writer: Any = None) -> None:
        self.writer = writer
        self._held: dict[str, list[ShardSearcher]] = {}
        for generation in generations:
            self.add(generation, self.open(generation))

    def open(self, generation: Generation) -> list[ShardSearcher]:
        """Open all shards of ``generation``, without their shortlists, and re-rank what they store."""
        shards = [ShardSearcher.open(uri) for uri in generation.folders(0, 1)]
        for shard in shards:
            for row, vector in sample(shard):
                found = Hits(np.array([[row]]), np.zeros((1, 1), np.float32))
                shard.rerank(vector, found, 10, generation.plans.default)
        return shards

    def add(self, generation: Generation, opened: list[ShardSearcher]) -> None:
        """Answer for an opened generation from now on."""
        self._held[generation.name] = opened

    def drop(self, name: str) -> None:
        """Let go of a generation; calls under way keep what they use."""
        self._held.pop(name, None)

    async def rerank(
        self, generation: str, queries: bytes, k: int, plan: str, candidates: Mapping[int, Shortlisted]
    ) -> Packed:
        """The ``k`` best rows among ``candidates`` (group -> shortlist)."""
        if generation not in self._held:
            raise not_loaded(generation, self._held)
        return await asyncio.to_thread(self._rerank, self._held[generation], queries, k, plan, candidates)

    def _rerank(
        self,
        shards: Sequence[ShardSearcher],
        queries: bytes,
        k: int,
        plan: str,
        candidates: Mapping[int, Shortlisted],
    ) -> Packed:
        vectors, parsed = _vectors(queries, shards[0].meta.dim), Plan.model_validate_json(plan)
        offsets = np.array([shard.meta.row_offset for shard in shards])
        parts, written = [], dict[int, Entry]()
        for rows, scores, final in candidates.values():
            if final is not None:
                answer = unpack(final, len(vectors))
                parts.append(answer.hits)
                written |= answer.entries
            found = read_hits(rows, scores, len(vectors))
            owners = np.searchsorted(offsets, found.rows, side="right") - 1  # -1 for no row
            for owner in np.unique(owners[owners >= 0]).tolist():
                own = Hits(np.where(owners == owner, found.rows, NO_ROW), found.scores)
                parts.append(shards[owner].rerank(vectors, own, k, parsed))
        hits = _merge(parts, k) if parts else empty_hits(len(vectors), k)
        names, best = column_names(shards), occurring_rows(hits)
        columns = read_columns(shards, names, best)
        for row in best[np.searchsorted(best, WRITTEN) :].tolist():
            for column, value in zip(columns, written[row], strict=True):
                column.append(value)
        return pack(hits, names, columns)


def warm_up(shard: ShardSearcher, plan: Plan) -> None:
    """Search for some stored vectors, so that the first callers do not wait for pages and packed steps."""
    for _, vector in sample(shard):
        shard.search(vector, 10, plan)


def sample(shard: ShardSearcher) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Some stored rows: global number, vector float32 [1, dim]."""
    for row in {number * shard.meta.num_rows // WARM_UP for number in range(WARM_UP if shard.meta.num_rows else 0)}:
        vector = shard.store.read(np.array([row]))
        if vector.any():
            yield row + shard.meta.row_offset, vector


def column_names(shards: Sequence[ShardSearcher]) -> list[str]:
    """The stored columns, the id first; all shards of an index have the same."""
    return sorted(shards[0].store.table.schema.names, key="image_id".__ne__)


def read_columns(
    shards: Sequence[ShardSearcher], names: Sequence[str], rows: npt.NDArray[np.int64], written: Written | None = None
) -> list[list[str | None]]:
    """What rising global ``rows``, stored in some shards or written since, hold in some columns."""
    columns: list[list[str | None]] = [[] for _ in names]
    for shard in shards:
        first = shard.meta.row_offset
        own = rows[slice(*np.searchsorted(rows, [first, first + shard.meta.num_rows]))]
        if len(own):
            _extend(columns, shard.store.read_columns(own - first, names))
    if written is not None:
        _extend(columns, written.read_columns(rows[np.searchsorted(rows, WRITTEN) :], names))
    return columns


def _extend(columns: Sequence[list[str | None]], more: Sequence[Column]) -> None:
    for column, values in zip(columns, more, strict=True):
        column.extend(values)


def _merge(parts: Sequence[Hits], k: int) -> Hits:
    return parts[0] if len(parts) == 1 else merge_hits(parts, k)


def _vectors(queries: bytes, dim: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(queries, "<f4").reshape(-1, dim)
