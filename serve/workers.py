"""The workers of an index: one for each group of shards, the re-ranker. Bytes in, bytes out; a Serve deployment is such
a class as it is.

A worker holds one generation or, while one takes over from another, several; every call names the generation it is
for, so no answer mixes two. Computing happens in a thread, so that a replica's event loop keeps answering health checks
and other requests.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Hits, empty_hits, merge_hits
from lookalike.retrieval.searcher import ShardSearcher
from lookalike.serve.answers import Entry, Packed, occurring_rows, pack, read_hits
from lookalike.serve.config import ServeConfig
from lookalike.serve.errors import not_loaded
from lookalike.serve.generation import Generation
from lookalike.serve.router import Router

Shortlisted = tuple[bytes, bytes]
"""Rows (int64) and scores (float32) of a group's shortlists."""
WARM_UP = 8
"""Searches that a worker makes by itself before it is asked."""


class ShardWorker:
    """One group of shards: shortlist and re-rank of their own rows."""

    def __init__(self, group: int, num_groups: int, generations: Sequence[Generation]) -> None:
        self._group, self._num_groups = group, num_groups
        self._held: dict[str, list[ShardSearcher]] = {}
        for generation in generations:
            self.hold(generation)

    def hold(self, generation: Generation) -> None:
        """Open the group's shards of ``generation``, with their shortlists, and touch what a search touches."""
        shards = [ShardSearcher.open(uri) for uri in generation.folders(self._group, self._num_groups)]
        for shard in shards:
            shard.load()
            warm_up(shard, generation.plans.default)
        self._held[generation.name] = shards

    def drop(self, name: str) -> None:
        """Let go of a generation; searches under way keep what they use."""
        self._held.pop(name, None)

    def _shards(self, generation: str) -> list[ShardSearcher]:
        if generation not in self._held:
            raise not_loaded(generation, self._held)
        return self._held[generation]

    async def search(self, generation: str, queries: bytes, k: int, plan: str, filters: str) -> Packed:
        """The group's ``k`` best rows for float32 [n, dim] ``queries``; ``plan`` and ``filters`` are JSON."""
        return await asyncio.to_thread(self._search, self._shards(generation), queries, k, plan, filters)

    def _search(self, shards: Sequence[ShardSearcher], queries: bytes, k: int, plan: str, filters: str) -> Packed:
        parsed, conditions = Plan.model_validate_json(plan), json.loads(filters)
        hits = _merge([shard.search(_vectors(queries, shard.meta.dim), k, parsed, conditions) for shard in shards], k)
        return pack(hits, read_entries(shards, occurring_rows(hits)))

    async def shortlist(self, generation: str, queries: bytes, k: int, plan: str, filters: str) -> Shortlisted:
        """The group's candidates, for the re-ranker."""
        return await asyncio.to_thread(self._shortlist, self._shards(generation), queries, k, plan, filters)

    def _shortlist(
        self, shards: Sequence[ShardSearcher], queries: bytes, k: int, plan: str, filters: str
    ) -> Shortlisted:
        parsed, conditions = Plan.model_validate_json(plan), json.loads(filters)
        found = [shard.shortlist(_vectors(queries, shard.meta.dim), k, parsed, conditions) for shard in shards]
        rows, scores = np.hstack([hits.rows for hits in found]), np.hstack([hits.scores for hits in found])
        return rows.astype("<i8").tobytes(), scores.astype("<f4").tobytes()

    async def vectors(self, generation: str, image_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored vectors of those ids that this group holds."""
        return await asyncio.to_thread(self._stored, self._shards(generation), image_ids)

    def _stored(self, shards: Sequence[ShardSearcher], image_ids: Sequence[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for shard in shards:
            rows = {image_id: row for image_id in image_ids if (row := shard.find(image_id)) >= 0}
            local = np.fromiter(rows.values(), np.int64, len(rows)) - shard.meta.row_offset
            vectors = shard.store.read(local)
            found |= {image_id: vector.astype("<f4").tobytes() for image_id, vector in zip(rows, vectors, strict=True)}
        return found


class RerankWorker:
    """Re-ranks the candidates of all groups, each shard's with its own rows, and merges them."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._held: dict[str, list[ShardSearcher]] = {}
        for generation in generations:
            self.hold(generation)

    def hold(self, generation: Generation) -> None:
        """Open all shards of ``generation``, without their shortlists."""
        self._held[generation.name] = [ShardSearcher.open(uri) for uri in generation.folders(0, 1)]

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
        self, shards: Sequence[ShardSearcher], queries: bytes, k: int, plan: str,
        candidates: Mapping[int, Shortlisted],
    ) -> Packed:  # fmt: skip
        vectors, parsed = _vectors(queries, shards[0].meta.dim), Plan.model_validate_json(plan)
        offsets = np.array([shard.meta.row_offset for shard in shards])
        parts = []
        for rows, scores in candidates.values():
            found = read_hits(rows, scores, len(vectors))
            owners = np.searchsorted(offsets, found.rows, side="right") - 1  # -1 for no row
            for owner in np.unique(owners[owners >= 0]).tolist():
                own = Hits(np.where(owners == owner, found.rows, NO_ROW), found.scores)
                parts.append(shards[owner].rerank(vectors, own, k, parsed))
        hits = _merge(parts, k) if parts else empty_hits(len(vectors), k)
        return pack(hits, read_entries(shards, occurring_rows(hits)))


def warm_up(shard: ShardSearcher, plan: Plan) -> None:
    """Search for some stored vectors, so that the first callers do not wait for pages and packed steps."""
    for row in {number * shard.meta.num_rows // WARM_UP for number in range(WARM_UP if shard.meta.num_rows else 0)}:
        vector = shard.store.read(np.array([row]))
        if vector.any():
            shard.search(vector, 10, plan)


def read_entries(shards: Sequence[ShardSearcher], rows: npt.NDArray[np.int64]) -> list[Entry]:
    """Id and stored columns (nulls left out) of rising global ``rows`` of some shards."""
    entries: list[Entry] = []
    for shard in shards:
        first = shard.meta.row_offset
        own = rows[slice(*np.searchsorted(rows, [first, first + shard.meta.num_rows]))]
        if len(own):
            entries += [(record.pop("image_id"), {name: str(value) for name, value in record.items()
                                                  if value is not None})
                        for record in shard.store.table.take(own - first).to_pylist()]  # fmt: skip
    return entries


def open_workers(config: ServeConfig, generation: Generation, others: Sequence[Generation] = ()) -> Router:
    """All workers in this process, holding ``others`` (arms of an experiment) too: placement ``fused``, local mode."""
    num_groups = generation.meta.num_hash_shards
    held = [generation, *others]
    shards = [ShardWorker(group, num_groups, held) for group in range(num_groups)]
    if all(one.encoder is None for one in held):
        return Router(shards)
    from lookalike.serve.encoding import EncoderWorker  # torch: only for those who encode

    return Router(shards, encoder=EncoderWorker(config, held))


def _merge(parts: Sequence[Hits], k: int) -> Hits:
    return parts[0] if len(parts) == 1 else merge_hits(parts, k)


def _vectors(queries: bytes, dim: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(queries, "<f4").reshape(-1, dim)
