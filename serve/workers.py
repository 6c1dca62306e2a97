"""The workers of an index: one shard, the re-ranker. Bytes in, bytes out; a Serve deployment is such a class as it is.

Computing happens in a thread, so that a replica's event loop keeps answering health checks and other requests.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.index_meta import IndexMeta
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import merge_hits
from lookalike.retrieval.searcher import ShardSearcher
from lookalike.serve.answers import Entry, Packed, occurring_rows, pack, read_hits
from lookalike.serve.config import ServeConfig
from lookalike.serve.router import Router

Shortlisted = tuple[bytes, bytes]
"""Rows (int64) and scores (float32) of a shard's shortlist."""


class ShardWorker:
    """One shard: shortlist and re-rank of its own rows."""

    def __init__(self, uri: str) -> None:
        self._shard = ShardSearcher.open(uri)
        self._shard.load()

    async def search(self, queries: bytes, k: int, plan: str, filters: str) -> Packed:
        """The shard's ``k`` best rows for float32 [n, dim] ``queries``; ``plan`` and ``filters`` are JSON."""
        return await asyncio.to_thread(self._search, queries, k, plan, filters)

    def _search(self, queries: bytes, k: int, plan: str, filters: str) -> Packed:
        hits = self._shard.search(_vectors(queries, self._shard.meta.dim), k, Plan.model_validate_json(plan),
                                  json.loads(filters))  # fmt: skip
        return pack(hits, read_entries(self._shard, occurring_rows(hits)))

    async def shortlist(self, queries: bytes, k: int, plan: str, filters: str) -> Shortlisted:
        """The shard's candidates, for the re-ranker."""
        return await asyncio.to_thread(self._shortlist, queries, k, plan, filters)

    def _shortlist(self, queries: bytes, k: int, plan: str, filters: str) -> Shortlisted:
        hits = self._shard.shortlist(_vectors(queries, self._shard.meta.dim), k, Plan.model_validate_json(plan),
                                     json.loads(filters))  # fmt: skip
        return hits.rows.astype("<i8").tobytes(), hits.scores.astype("<f4").tobytes()

    async def vectors(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored vectors of those ids that this shard holds."""
        return await asyncio.to_thread(self._stored, image_ids)

    def _stored(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        rows = {image_id: row for image_id in image_ids if (row := self._shard.find(image_id)) >= 0}
        local = np.fromiter(rows.values(), np.int64, len(rows)) - self._shard.meta.row_offset
        vectors = self._shard.store.read(local)
        return {image_id: vector.astype("<f4").tobytes() for image_id, vector in zip(rows, vectors, strict=True)}


class RerankWorker:
    """Re-ranks the candidates of all shards, each with its shard's own rows, and merges them."""

    def __init__(self, uris: Sequence[str]) -> None:
        self._shards = [ShardSearcher.open(uri) for uri in uris]

    async def rerank(self, queries: bytes, k: int, plan: str, candidates: Mapping[int, Shortlisted]) -> Packed:
        """The ``k`` best rows among ``candidates`` (shard -> shortlist)."""
        return await asyncio.to_thread(self._rerank, queries, k, plan, candidates)

    def _rerank(self, queries: bytes, k: int, plan: str, candidates: Mapping[int, Shortlisted]) -> Packed:
        vectors, parsed = _vectors(queries, self._shards[0].meta.dim), Plan.model_validate_json(plan)
        parts = []
        for shard, (rows, scores) in candidates.items():
            parts.append(self._shards[shard].rerank(vectors, read_hits(rows, scores, len(vectors)), k, parsed))
        hits = merge_hits(parts, k)
        by_row: dict[int, Entry] = {}
        for shard, part in zip(candidates, parts, strict=True):
            kept = np.intersect1d(occurring_rows(part), occurring_rows(hits)).astype(np.int64)
            by_row.update(zip(kept.tolist(), read_entries(self._shards[shard], kept), strict=True))
        return pack(hits, [by_row[row] for row in occurring_rows(hits).tolist()])


def read_entries(shard: ShardSearcher, rows: npt.NDArray[np.int64]) -> list[Entry]:
    """Id and stored columns (nulls left out) of global ``rows`` of a shard."""
    records = shard.store.table.take(rows - shard.meta.row_offset).to_pylist()
    return [(record.pop("image_id"), {name: str(value) for name, value in record.items() if value is not None})
            for record in records]  # fmt: skip


def shard_uris(config: ServeConfig, meta: IndexMeta) -> list[str]:
    """Folders of the shards, in the order of their rows."""
    return [f"{config.index.rstrip('/')}/{name}" for name in meta.shards]


def open_workers(config: ServeConfig, meta: IndexMeta, encoder_uri: str | None) -> Router:
    """All workers in this process: placement ``fused``, and local mode."""
    shards = [ShardWorker(uri) for uri in shard_uris(config, meta)]
    if encoder_uri is None:
        return Router(shards)
    from lookalike.serve.encoding import EncoderWorker  # torch: only for those who encode

    return Router(shards, encoder=EncoderWorker(encoder_uri, config))


def _vectors(queries: bytes, dim: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(queries, "<f4").reshape(-1, dim)
