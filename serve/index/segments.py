"""Incremental build: what a hash shard keeps of a previous index, and what it adds.

A hash shard is a list of segments, each in its own shard folder: a base, and what later builds appended. Each row has a
digest of what it was made from, which tells a build which rows are new, changed or gone. If these are

- none: all segments are kept (hard links on a disk, copies elsewhere, so the previous index may be removed);
- few: the segments are kept, with tombstones for rows that are gone or changed, and a new segment holds the new rows;
- many, or if there would be too many segments: the whole shard is built again, which is compaction.

As long as the embeddings of the previous index still exist, a part file that they also contain is recognised by its
SHA-256, and only its ids are read.

Searches give the same answers as with an index built whole. Row numbers may differ, and so the order of equal scores.
"""

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

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
KINDS: tuple[Kind, ...] = get_args(Kind)
Uris = tuple[str, str]
"""Where a folder will be, and where it is filled."""


class SegmentOptions(Config):
    """How rows are divided into shards and segments."""

    num_shards: int = Field(default=2, ge=1, le=10_000)
    """Number of shards; each may have its own replicas."""
    append_share: float = Field(default=0.2, ge=0, le=1)
    """With a previous index: append to a shard as long as its new, changed and gone rows are at most this share of its
    rows, and those under tombstones at most this share of what it stores. Otherwise, and with 0, build it whole."""
    max_segments: int = Field(default=4, ge=1, le=64)
    """Most segments of a shard; beyond them it is built whole."""
    batch_rows: int = runtime(16_384, ge=1, le=1 << 24)
    """Rows of vectors read at a time."""


@dataclass(frozen=True)
class Previous:
    """The index that a build starts from. Plain values, so that Ray tasks can take them."""

    uri: str
    segments: list[list[str]]
    """Segment folders of each hash shard."""
    sha256: dict[str, str]
    """Path of a file in the artifact -> its SHA-256."""
    parts: frozenset[str]
    """SHA-256 of the embeddings' part files that this index was made from with the same ``where``."""

    @classmethod
    def of(cls, artifact: Artifact, meta: IndexMeta, where: Mapping[str, Any]) -> "Previous":
        """Return the facts of an opened index, for a build with the conditions ``where``."""
        owners = meta.hash_shards or range(meta.num_shards)
        segments: list[list[str]] = [[] for _ in range(meta.num_hash_shards)]
        for owner, name in zip(owners, meta.shards, strict=True):
            segments[owner].append(name)
        sha256 = {file.path: file.sha256 for file in artifact.manifest.files}
        same = artifact.manifest.config.get("where") == where
        return cls(artifact.uri, segments, sha256, _parts_of(artifact) if same else frozenset())

    def check(self, path: str, copy: str | None = None) -> None:
        """Raise ``ArtifactError`` unless the file at ``path`` (or its ``copy``) is what the manifest says.

        The new manifest takes the hashes of kept files, so damage that is missed here would never be noticed again.
        """
        uri = storage.join(self.uri, path)
        if not storage.exists(copy or uri) or storage.sha256(copy or uri) != self.sha256[path]:
            raise ArtifactError(
                f"{uri} is damaged: it does not match its SHA-256 in the manifest; restore it from a "
                "copy, or build without a previous index"
            )


def _parts_of(index: Artifact) -> frozenset[str]:
    """Return the SHA-256 of the files that an index was made from; none if they are gone or have changed."""
    for name, entry, uri in index.parents():
        if name == "embeddings":
            with suppress(ArtifactError):
                parent = Artifact.open(uri, entry.kind, check=False)
                return frozenset(file.sha256 for file in parent.manifest.files if parent.digest == entry.digest)
    return frozenset()


class KeptSegment(Config):
    """A segment of the previous index that the next one keeps."""

    folder: str
    """Its folder in the previous index."""
    num_deleted: int
    """All rows under tombstones, old and new."""


class ShardChange(Config):
    """What a build does with a hash shard."""

    kind: Kind
    kept: tuple[KeptSegment, ...] = ()
    num_fresh: int
    """Rows of the segment to build; if the shard is rebuilt, all its rows."""


class SegmentRows(NamedTuple):
    """The part of a segment that a comparison needs."""

    ids: pa.ChunkedArray
    digests: Digests
    live: Mask


class RowComparison(NamedTuple):
    """A shard's rows compared with the segments of the previous index."""

    stay: list[Mask]
    """Per segment, the live rows that have not changed."""
    fresh: Mask
    """Rows of the shard that no segment holds in this form."""
    num_gone: int
    """Live rows of the segments whose id is gone."""


def build_facts(meta: IndexMeta, version: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a shard's files depend on besides its rows; ``options`` are the settings of the index stage."""
    facts = {"stage version": version, "encoder": meta.model_fingerprint, "num_shards": meta.num_hash_shards}
    same = {name: getattr(meta, name) for name in ("dims", "dtype", "shortlist", "shortlist_dims", "columns")}
    return facts | same | {name: options.get(name) for name in ShortlistOptions.model_fields}


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return why no part of an index with the facts ``old`` can be kept, in words; empty if parts can be kept."""
    return "; ".join(f"{name} was {old[name]!r}, is {new[name]!r}" for name in new if old[name] != new[name])


def read_segment(previous: Previous, folder: str) -> SegmentRows:
    """Read ids, digests and live rows of a segment."""
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
    ids: pa.ChunkedArray, digests: Digests, unchanged: Mask, segments: Sequence[SegmentRows]
) -> RowComparison:
    """Compare the rows of a shard, ``ids`` [n] and ``digests`` [n], with the segments of the previous index.

    The digests of rows in ``unchanged`` [n] are ignored: these rows are known to be as they were.
    """
    fresh, num_gone, stay = np.ones(len(ids), bool), 0, []
    for segment in segments:
        rows = pc.index_in(segment.ids, value_set=ids).fill_null(-1).to_numpy().astype(np.int64)
        present = (rows >= 0) & segment.live
        same = present.copy()
        same[present] = unchanged[rows[present]] | (digests[rows[present]] == segment.digests[present])
        fresh[rows[same]] = False
        num_gone += int((segment.live & ~present).sum())
        stay.append(same)
    return RowComparison(stay, fresh, num_gone)


def decide(options: SegmentOptions, comparison: RowComparison) -> Kind:
    """Return what to do with a shard."""
    stay, fresh, num_gone = comparison
    num_fresh = int(fresh.sum())
    if not num_fresh and not num_gone:
        return "reused"
    kept = [mask for mask in stay if mask.any()]
    num_stored = num_fresh + sum(len(mask) for mask in kept)
    num_deleted = sum(int((~mask).sum()) for mask in kept)
    share = options.append_share
    few = num_fresh + num_gone <= share * len(fresh) and num_deleted <= share * num_stored
    return "appended" if few and len(kept) + bool(num_fresh) <= options.max_segments else "rebuilt"


def compare_shard(
    source: EmbeddingRows, options: SegmentOptions, previous: Previous, shard: int, work: str
) -> ShardChange:
    """Decide about one hash shard; write the masks of kept and new rows to ``work``.npz for the build."""
    if storage.exists(f"{work}.json"):
        return ShardChange.model_validate(json.loads(storage.read_bytes(f"{work}.json")))
    shard_rows = collect_rows(source, shard, options.num_shards)
    unchanged = np.zeros(len(shard_rows.table), bool)
    for sha256, rows in zip(source.sha256, shard_rows.rows, strict=True):
        unchanged[rows] = sha256 in previous.parts
    folders = previous.segments[shard]
    segments = [read_segment(previous, folder) for folder in folders]
    digests = _digest_changeable(source, shard_rows, unchanged, options.batch_rows)
    comparison = compare_rows(shard_rows.table["image_id"], digests, unchanged, segments)
    kind, fresh = decide(options, comparison), comparison.fresh
    masks = {
        folder: mask for folder, mask in zip(folders, comparison.stay, strict=True) if mask.any() or kind == "reused"
    }
    if kind == "rebuilt":
        masks, fresh = {}, np.ones(len(fresh), bool)
    kept = tuple(KeptSegment(folder=folder, num_deleted=int((~mask).sum())) for folder, mask in masks.items())
    change = ShardChange(kind=kind, kept=kept, num_fresh=int(fresh.sum()))
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, fresh=fresh, **masks)  # type: ignore[arg-type]  # names are keywords
    storage.write_atomic(f"{work}.npz", content.getvalue())
    storage.write_atomic(f"{work}.json", change.model_dump_json().encode())
    return change


def _digest_changeable(source: EmbeddingRows, shard_rows: ShardRows, unchanged: Mask, batch_rows: int) -> Digests:
    """Return digests uint64 [n]; 0 for ``unchanged`` rows, whose vectors are not read."""
    digests, places = np.zeros(len(unchanged), np.uint64), np.flatnonzero(~unchanged)
    rest = shard_rows.only(~unchanged)
    for rows, vectors in read_vectors(source, rest, batch_rows):
        digests[places[rows]] = digest_rows(rest.table.take(pa.array(rows)), vectors)
    return digests


def read_mask(work: str, name: str) -> Mask:
    """Read a mask that ``compare_shard`` wrote: ``fresh``, or the rows that stay in a kept folder."""
    mask: Mask = _load(f"{work}.npz")[name]
    return mask


@contextmanager
def new_folder(uri: str, scratch: str) -> Iterator[str]:
    """Give the block a folder to fill, ``shard.json`` last, which is at ``uri`` when the block ends.

    On a local disk it is filled in ``scratch`` and then renamed, so that a killed or still running attempt cannot mix
    with this one; elsewhere it is filled in place.
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


def keep_segment(previous: Previous, kept: str, meta: ShardMeta, work: str, uris: Uris) -> ShardMeta:
    """Link or copy the segment ``kept`` of the previous index; ``uris`` are the new folder and the scratch folder."""
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
