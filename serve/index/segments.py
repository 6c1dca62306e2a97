"""Incremental build: what a hash shard keeps of a previous index, and what it adds.

A hash shard is a list of segments, each a shard folder of its own: a base, and what later builds appended. Each row of
a segment has a digest of what it was made from, so that a build tells which rows are new, changed or gone:

- none: all segments are kept (hard links on a disk, copies elsewhere: the previous index may be removed)
- few: the segments are kept, with tombstones for rows that are gone or changed, and a new segment holds the new rows
- many, or the segments would be too many: the shard is built whole again, which is compaction

While the embeddings that the previous index was made from are there, a part file that is also among theirs is known by
its SHA-256, and only the ids of its rows are read.

The answers are those of an index built whole; the numbers of rows may differ, and so the order of equal scores.
"""

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.config import Config, runtime
from lookalike.errors import ArtifactError
from lookalike.retrieval.index_meta import IndexMeta
from lookalike.retrieval.index_types import ShortlistOptions
from lookalike.retrieval.ranking import Mask
from lookalike.retrieval.shard_meta import DIGESTS_FILE, ROWS_FILE, SHARD_META, TOMBSTONES_FILE, ShardMeta, read_meta
from lookalike.retrieval.store_writer import write_tombstones
from lookalike.serve.index.rows import Digests, EmbeddingRows, ShardRows, collect_rows, digest_rows, read_vectors

Kind = Literal["reused", "appended", "rebuilt"]
KINDS: tuple[Kind, ...] = ("reused", "appended", "rebuilt")


class SegmentOptions(Config):
    """How rows are divided into shards and segments."""

    num_shards: int = Field(default=2, ge=1, le=10_000)
    """Shards, each of which may be served by its own replicas."""
    append_share: float = Field(default=0.2, ge=0, le=1)
    """With a previous index: a shard is appended to while the rows that are new, changed or gone are at most this share
    of its rows, and those under tombstones at most this share of what it stores; else it is built whole. 0: always."""
    max_segments: int = Field(default=4, ge=1, le=64)
    """Segments of a shard at most; one more, and it is built whole."""
    batch_rows: int = runtime(16_384, ge=1, le=1 << 24)
    """Vectors read at a time, in rows."""


@dataclass(frozen=True)
class Previous:
    """The index that a build starts from: plain values, sent to Ray tasks."""

    uri: str
    segments: list[list[str]]
    """Folders of each hash shard."""
    sha256: dict[str, str]
    """Of each file, by its path in the artifact."""
    parts: frozenset[str]
    """SHA-256 of the parts all of whose rows (those that ``where`` keeps) it holds as they are."""

    @classmethod
    def of(cls, artifact: Artifact, meta: IndexMeta, where: Mapping[str, Any]) -> "Previous":
        """An opened index, for a build with the conditions ``where``."""
        owners = meta.hash_shards or range(meta.num_shards)
        segments: list[list[str]] = [[] for _ in range(meta.num_hash_shards)]
        for owner, name in zip(owners, meta.shards, strict=True):
            segments[owner].append(name)
        sha256 = {file.path: file.sha256 for file in artifact.manifest.files}
        same = artifact.manifest.config.get("where") == where
        return cls(artifact.uri, segments, sha256, _parts_of(artifact) if same else frozenset())

    def check(self, path: str, copy: str | None = None) -> None:
        """Raise ``ArtifactError`` unless the file at ``path`` (or its ``copy``) is what the manifest says.

        What is kept is hashed for the new manifest: damage that slipped by here would be sound from then on.
        """
        uri = storage.join(self.uri, path)
        if not storage.exists(copy or uri) or storage.sha256(copy or uri) != self.sha256[path]:
            raise ArtifactError(
                f"{uri} is damaged: it does not match its SHA-256 in the manifest; restore it from a "
                "copy, or build without a previous index"
            )


def _parts_of(index: Artifact) -> frozenset[str]:
    """SHA-256 of the files that an index was made from; none when they are gone or not what they were."""
    for name, entry, uri in index.parents():
        if name == "embeddings":
            with suppress(ArtifactError):
                found = Artifact.open(uri, entry.kind, check=False)
                return frozenset(file.sha256 for file in found.manifest.files if found.digest == entry.digest)
    return frozenset()


class KeptSegment(Config):
    """A segment that goes on."""

    folder: str
    """In the previous index."""
    num_deleted: int
    """Rows under tombstones, in all."""


class ShardChange(Config):
    """What becomes of a hash shard."""

    kind: Kind
    kept: tuple[KeptSegment, ...] = ()
    """Segments of the previous index that go on."""
    num_fresh: int
    """Rows of the segment that is built: all of a shard that is rebuilt."""


class SegmentRows(NamedTuple):
    """What comparing needs of a segment."""

    ids: pa.ChunkedArray
    digests: Digests
    live: Mask


def build_facts(meta: IndexMeta, version: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a shard's files depend on beside its rows; ``options`` are the settings of the index stage."""
    facts = {"stage version": version, "encoder": meta.model_fingerprint, "num_shards": meta.num_hash_shards}
    same = {name: getattr(meta, name) for name in ("dims", "dtype", "shortlist", "shortlist_dims", "columns")}
    return facts | same | {name: options.get(name) for name in ShortlistOptions.model_fields}


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Why nothing of an index with the facts ``old`` can be kept, in words; empty when something can."""
    return "; ".join(f"{name} was {old[name]!r}, is {new[name]!r}" for name in new if old[name] != new[name])


def read_segment(previous: Previous, folder: str) -> SegmentRows:
    """Ids, digests and live rows of a segment, nothing else of it."""
    meta = read_meta(storage.join(previous.uri, folder))
    for name in (ROWS_FILE, DIGESTS_FILE, *([TOMBSTONES_FILE] if meta.num_deleted else [])):
        previous.check(f"{folder}/{name}")
    filesystem, path = storage.arrow_filesystem(storage.join(previous.uri, folder, ROWS_FILE))
    with filesystem.open_input_file(path) as file:
        names = pa.ipc.open_file(file).schema.names
        options = pa.ipc.IpcReadOptions(included_fields=[names.index("image_id")])
        ids = pa.ipc.open_file(file, options=options).read_all()["image_id"]
    live = np.ones(meta.num_rows, bool)
    if meta.num_deleted:
        bits = _load(storage.join(previous.uri, folder, TOMBSTONES_FILE))[0]
        live = ~np.unpackbits(bits, count=meta.num_rows, bitorder="little").astype(bool)
    return SegmentRows(ids, _load(storage.join(previous.uri, folder, DIGESTS_FILE))[0], live)


def _load(uri: str) -> Any:
    return np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)


def compare_rows(
    ids: pa.ChunkedArray, digests: Digests, seen: Mask, segments: Sequence[SegmentRows]
) -> tuple[list[Mask], Mask, int]:
    """(live rows of each segment that are as they were, rows of ``ids`` that none holds so, ids that are gone).

    The digests of rows that are ``seen`` [n] are not looked at: such a row is as it was.
    """
    fresh, gone, stay = np.ones(len(ids), bool), 0, []
    for segment in segments:
        found = pc.index_in(segment.ids, value_set=ids)
        rows = found.fill_null(-1).to_numpy().astype(np.int64)
        known = (rows >= 0) & segment.live
        same = known.copy()
        same[known] = seen[rows[known]] | (digests[rows[known]] == segment.digests[known])
        fresh[rows[same]] = False
        gone += int((segment.live & ~known).sum())
        stay.append(same)
    return stay, fresh, gone


def decide(options: SegmentOptions, stay: Sequence[Mask], fresh: Mask, gone: int) -> Kind:
    """What becomes of a shard, from the result of :func:`compare_rows`."""
    num_fresh = int(fresh.sum())
    if not num_fresh and not gone:
        return "reused"
    going_on = [mask for mask in stay if mask.any()]
    stored = num_fresh + sum(len(mask) for mask in going_on)
    deleted = sum(int((~mask).sum()) for mask in going_on)
    few = num_fresh + gone <= options.append_share * len(fresh) and deleted <= options.append_share * stored
    return "appended" if few and len(going_on) + bool(num_fresh) <= options.max_segments else "rebuilt"


def compare_shard(
    source: EmbeddingRows, options: SegmentOptions, previous: Previous, shard: int, work: str
) -> ShardChange:
    """Decide about one hash shard; which rows stay and which are new goes to ``work``.npz, for those who build."""
    if storage.exists(f"{work}.json"):
        return ShardChange.model_validate(json.loads(storage.read_bytes(f"{work}.json")))
    own = collect_rows(source, shard, options.num_shards)
    seen = np.zeros(len(own.table), bool)
    for sha256, rows in zip(source.sha256, own.rows, strict=True):
        seen[rows] = sha256 in previous.parts
    folders = previous.segments[shard]
    stored = [read_segment(previous, folder) for folder in folders]
    digests = _digest_unseen(source, own, seen, options.batch_rows)
    stay, fresh, gone = compare_rows(own.table["image_id"], digests, seen, stored)
    kind = decide(options, stay, fresh, gone)
    masks = {folder: mask for folder, mask in zip(folders, stay, strict=True) if mask.any() or kind == "reused"}
    if kind == "rebuilt":
        masks, fresh = {}, np.ones(len(fresh), bool)
    kept = tuple(KeptSegment(folder=folder, num_deleted=int((~mask).sum())) for folder, mask in masks.items())
    change = ShardChange(kind=kind, kept=kept, num_fresh=int(fresh.sum()))
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, fresh=fresh, **masks)  # type: ignore[arg-type]  # names are keywords
    storage.write_atomic(f"{work}.npz", content.getvalue())
    storage.write_atomic(f"{work}.json", change.model_dump_json().encode())
    return change


def _digest_unseen(source: EmbeddingRows, own: ShardRows, seen: Mask, batch_rows: int) -> Digests:
    """Digests uint64 [n] of the rows that are not ``seen``, 0 for those that are."""
    digests, unseen = np.zeros(len(seen), np.uint64), np.flatnonzero(~seen)
    rest = own.only(~seen)
    for rows, vectors in read_vectors(source, rest, batch_rows):
        digests[unseen[rows]] = digest_rows(rest.table.take(pa.array(rows)), vectors)
    return digests


def read_mask(work: str, name: str) -> Mask:
    """A mask that :func:`compare_shard` left: ``fresh``, or the rows of a kept folder that stay."""
    mask: Mask = _load(f"{work}.npz")[name]
    return mask


@contextmanager
def new_folder(uri: str, scratch: str) -> Iterator[str]:
    """A folder to fill, its ``shard.json`` last, that stands at ``uri`` when the block ends.

    On a local disk it is filled in ``scratch`` and renamed, so that an attempt that was killed, or one that still
    runs, cannot mix with this one; elsewhere it is filled in its place.
    """
    storage.remove_tree(uri)
    if not storage.is_local(uri):
        storage.make_directory(uri)
        yield uri
        return
    folder = f"{storage.local_path(scratch)}/{uri.rpartition('/')[2]}-{uuid.uuid4().hex[:8]}"
    os.makedirs(folder)
    yield folder
    os.rename(folder, storage.local_path(uri))


def keep_segment(previous: Previous, kept: str, meta: ShardMeta, work: str, uris: tuple[str, str]) -> ShardMeta:
    """Give the segment ``kept`` of the previous index a folder of its own here; ``uris``: the folder, and scratch."""
    with new_folder(*uris) as folder:
        for path in sorted(previous.sha256):
            name = path.removeprefix(f"{kept}/")
            if name not in (path, SHARD_META, TOMBSTONES_FILE):
                copy = storage.join(folder, name)
                storage.share_file(storage.join(previous.uri, path), copy)
                previous.check(path, copy)
        if meta.num_deleted:
            write_tombstones(folder, ~read_mask(work, kept))
        storage.write_atomic(storage.join(folder, SHARD_META), meta.model_dump_json(indent=1).encode())
    return meta
