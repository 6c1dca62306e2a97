"""The workers of an index: one for each group of shards, and the re-ranker. Each class is a Serve deployment as well.

A worker may hold several generations, when one takes over from another. Every call names its generation, so no answer
mixes two. Computing happens in a thread, so that a replica's event loop keeps answering health checks and other
requests. A question that comes packed, from another process, gets a packed answer.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Hits, empty_hits, merge_hits
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.search.delta import WRITTEN, Delta, WrittenRows, search_all, shortlist_all
from lookalike.serve.search.integrity import Integrity, StoredFile, list_files
from lookalike.serve.wire.answers import Answer, Column, Entry, Packed, compose, occurring_rows, pack, read_hits, unpack
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import not_loaded

T = TypeVar("T")
WARM_UP = 8
"""Searches that a worker makes before it takes requests."""


class GroupShortlist(NamedTuple):
    """A group's candidates, for the re-ranker."""

    rows: bytes
    """int64 [n, candidates]."""
    scores: bytes
    """float32 [n, candidates]."""
    written: Packed | None
    """Hits among written rows, if there are any."""


class ShardGroup(NamedTuple):
    """One generation in one worker."""

    shards: list[ShardSearcher]
    delta: Delta
    files: list[StoredFile]


class RerankShards(NamedTuple):
    """One generation in the re-ranker."""

    shards: list[ShardSearcher]
    files: list[StoredFile]


class ShardWorker(Follows):
    """One group of shards: shortlist and re-rank of their rows, and of rows written to them since."""

    def __init__(self, group: int, num_groups: int, generations: Sequence[Generation], writer: Any = None) -> None:
        self._group, self._num_groups, self.writer = group, num_groups, writer
        self.generations: dict[str, ShardGroup] = {}
        self._integrity = Integrity()
        for generation in generations:
            self.add(generation, self.open(generation))

    def open(self, generation: Generation) -> ShardGroup:
        """Open the group's shards of ``generation`` with their shortlists, check their files, and warm them up."""
        folders = generation.folders(self._group, self._num_groups)
        shards = [ShardSearcher.open(uri) for uri in folders]
        files = list_files(generation, shards, folders)
        self._integrity.check(generation, files)
        for shard in shards:
            shard.load()
            warm_up(shard, generation.plans.default)
        return ShardGroup(shards, Delta(generation.meta, shards, self._group, self._num_groups), files)

    def add(self, generation: Generation, opened: ShardGroup) -> None:
        self.generations[generation.name] = opened
        self._integrity.watch(generation.name, opened.files)

    def drop(self, name: str) -> None:
        """Let go of a generation; searches under way keep what they use."""
        self.generations.pop(name, None)
        self._integrity.forget(name)

    def apply(self, opened: ShardGroup, records: Sequence[WriteRecord]) -> None:
        opened.delta.apply(records)

    async def search(self, ask: Ask | bytes) -> Packed | Answer:
        """The group's best rows."""
        write: Callable[..., Packed | Answer] = compose
        if isinstance(ask, bytes):
            ask, write = Ask.unpack(ask), pack
        return await asyncio.to_thread(_search, self._get(ask.generation), ask, write)

    async def shortlist(self, ask: Ask | bytes) -> GroupShortlist:
        """The group's candidates."""
        ask = Ask.unpack(ask) if isinstance(ask, bytes) else ask
        return await asyncio.to_thread(_shortlist, self._get(ask.generation), ask)

    async def count_rows(self, generation: str) -> int:
        """Rows that a search may find: neither deleted nor replaced, written ones included."""
        group: ShardGroup = _get(self.generations, generation)
        written = group.delta.written()
        stored = sum(shard.num_live for shard in group.shards)
        return stored if written is None else stored - sum(map(len, written.replaced)) + len(written.alive)

    async def vectors(self, generation: str, image_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored vectors of those ids that this group holds."""
        return await asyncio.to_thread(_read_vectors, self._get(generation), image_ids)

    def _get(self, name: str) -> ShardGroup:
        if self._integrity.damage:
            self._integrity.require_sound(name)
        return _get(self.generations, name)


def _get(generations: Mapping[str, T], name: str) -> T:
    if name not in generations:
        raise not_loaded(name, generations)
    return generations[name]


def _search(group: ShardGroup, ask: Ask, write: Callable[..., Packed | Answer]) -> Packed | Answer:
    written = group.delta.written()
    hits = search_all(group.shards, written, ask)
    names = column_names(group.shards)
    return write(hits, names, read_columns(group.shards, names, occurring_rows(hits), written))


def _shortlist(group: ShardGroup, ask: Ask) -> GroupShortlist:
    written = group.delta.written()
    candidates, final = shortlist_all(group.shards, written, ask), None
    if written is not None:
        hits, names = written.search(ask), column_names(group.shards)
        final = pack(hits, names, written.read_columns(occurring_rows(hits), names))
    return GroupShortlist(candidates.rows.astype("<i8").tobytes(), candidates.scores.astype("<f4").tobytes(), final)


def _read_vectors(group: ShardGroup, image_ids: Sequence[str]) -> dict[str, bytes]:
    written = {image_id: vector for image_id in image_ids if (vector := group.delta.find(image_id)) is not None}
    packed = {image_id: vector.astype("<f4").tobytes() for image_id, vector in written.items() if len(vector)}
    for shard in group.shards:
        rows = {
            image_id: row for image_id in image_ids if image_id not in written and (row := shard.find(image_id)) >= 0
        }
        vectors = shard.store.read(np.fromiter(rows.values(), np.int64, len(rows)) - shard.meta.row_offset)
        packed |= {image_id: vector.astype("<f4").tobytes() for image_id, vector in zip(rows, vectors, strict=True)}
    return packed


class RerankWorker(Follows):
    """Re-ranks the candidates of all groups, each shard's with its own rows, and merges them."""

    def __init__(self, generations: Sequence[Generation], writer: Any = None) -> None:
        self.writer = writer
        self._generations: dict[str, RerankShards] = {}
        self._integrity = Integrity()
        for generation in generations:
            self.add(generation, self.open(generation))

    def open(self, generation: Generation) -> RerankShards:
        """Open all shards of ``generation`` without their shortlists, check them, and re-rank some stored vectors."""
        folders = generation.folders(0, 1)
        shards = [ShardSearcher.open(uri) for uri in folders]
        files = list_files(generation, shards, folders)
        self._integrity.check(generation, files)
        for shard in shards:
            for row, vector in sample(shard):
                candidate = Hits(np.array([[row]]), np.zeros((1, 1), np.float32))
                shard.rerank(vector, candidate, 10, generation.plans.default)
        return RerankShards(shards, files)

    def add(self, generation: Generation, opened: RerankShards) -> None:
        self._generations[generation.name] = opened
        self._integrity.watch(generation.name, opened.files)

    def drop(self, name: str) -> None:
        """Let go of a generation; calls under way keep what they use."""
        self._generations.pop(name, None)
        self._integrity.forget(name)

    async def rerank(self, ask: Ask | bytes, shortlists: Mapping[int, GroupShortlist]) -> Packed:
        """The best rows among the ``shortlists`` of groups."""
        ask = Ask.unpack(ask) if isinstance(ask, bytes) else ask
        if self._integrity.damage:
            self._integrity.require_sound(ask.generation)
        shards = _get(self._generations, ask.generation).shards
        return await asyncio.to_thread(_rerank, shards, ask, list(shortlists.values()))


def _rerank(shards: Sequence[ShardSearcher], ask: Ask, shortlists: Sequence[GroupShortlist]) -> Packed:
    num_queries = len(ask.queries)
    offsets = np.array([shard.meta.row_offset for shard in shards])
    parts, written = list[Hits](), dict[int, Entry]()
    for rows, scores, final in shortlists:
        if final is not None:
            answer = unpack(final, num_queries)
            parts.append(answer.hits)
            written |= answer.entries
        candidates = read_hits(rows, scores, num_queries)
        owners = np.searchsorted(offsets, candidates.rows, side="right") - 1  # -1 for no row
        for owner in np.unique(owners[owners >= 0]).tolist():
            own = Hits(np.where(owners == owner, candidates.rows, NO_ROW), candidates.scores)
            parts.append(shards[owner].rerank(ask.queries, own, ask.k, ask.plan))
    hits = merge_hits(parts, ask.k) if len(parts) > 1 else parts[0] if parts else empty_hits(num_queries, ask.k)
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
    shards: Sequence[ShardSearcher],
    names: Sequence[str],
    rows: npt.NDArray[np.int64],
    written: WrittenRows | None = None,
) -> list[list[str | None]]:
    """Values in some columns of rising global ``rows``, which are stored in the shards or written since."""
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
