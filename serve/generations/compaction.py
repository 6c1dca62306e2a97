"""Compaction: an index that holds the writes, made as every index is.

The embeddings that the index was made from, with the written rows in the place of their old ones, are published as an
``embeddings`` artifact; then the index's own ``index`` stage runs over them with the old index as ``previous``, so that
shards without writes are kept, few changes are appended and many rebuild a shard. Both are published in the service's
folder; an attempt continues from what a killed one published.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.artifacts import Artifact, Draft, find, hash_json, lineage
from lookalike.cluster import background
from lookalike.errors import ArtifactError, LookalikeError, UsageError
from lookalike.retrieval.index_meta import IndexMeta, read_index_meta, shard_of
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.stages import execute, get_stage
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
ROOT = "artifacts"
"""Where in the service's folder the artifacts of compactions are."""
COMPACTING = ".compacting"
"""File under it that a compaction has locked while it works."""
SPARE_BYTES = 16 << 20
"""Space that a compaction leaves to the log of writes."""
BATCH_ROWS = 8192
"""Rows of a part that are held at a time."""
VERSION = 1
"""Raised when the same writes are merged otherwise."""


def final_rows(records: Iterable[WriteRecord]) -> dict[str, pb.Row | None]:
    """What the writes leave of each id that they touch: its row, or None when it is deleted."""
    rows: dict[str, pb.Row | None] = {}
    for record in records:
        message = record.message
        if isinstance(message, pb.UpsertRequest):
            rows |= {row.id: row for row in message.rows}
        else:
            rows |= dict.fromkeys(message.ids)
    return rows


def merge_embeddings(embeddings: Artifact, records: Sequence[WriteRecord], root: str) -> Artifact:
    """Publish ``embeddings`` with the writes merged in under ``root``; parts without touched rows are shared."""
    writes = hashlib.sha256()
    for record in records:
        writes.update(record.digest)
    mark, name = hash_json([VERSION, embeddings.digest, writes.hexdigest()])[:20], embeddings.manifest.name
    with storage.exclusive(storage.join(root, ".locks", f"embeddings-{name}-{mark}"), _tell_waiting):
        done = find(root, "embeddings", name, mark)
        return _merge(embeddings, records, Draft(root, "embeddings", name, mark)) if done is None else done


def _tell_waiting() -> None:
    log.warning("wait %s", fields(reason="an earlier attempt is still merging the same writes"))


def _merge(embeddings: Artifact, records: Sequence[WriteRecord], draft: Draft) -> Artifact:
    rows = final_rows(records)
    draft.clear()
    storage.make_directory(draft.uri)
    parts = embeddings.files("part-", ".parquet")
    if not parts:
        raise ArtifactError(f"{embeddings.uri} holds no part-*.parquet; run embed again")
    touched, num_kept = pa.array(rows, pa.string()), 0
    for part in parts:
        num_kept += _copy_part(part, draft.path(part.rpartition("/")[2]), touched)
    stored = [row for row in rows.values() if row is not None]
    if not num_kept and not stored:
        raise UsageError("the writes delete every row, and an index holds at least one; compact when there are some")
    if stored:
        filesystem, path = storage.arrow_filesystem(parts[0])
        table = make_table(stored, pq.read_schema(path, filesystem=filesystem))
        _write(table, draft.path(f"part-writes-{records[-1].number:020d}.parquet"))
    facts = embeddings.read_json("meta.json") | {"rows": num_kept + len(stored)}
    draft.write_json("meta.json", facts)
    draft.stats = {"rows": facts["rows"], "written_rows": len(stored), "deleted_ids": len(rows) - len(stored)}
    config = {"writes": [records[0].number, records[-1].number]}
    return draft.publish(config=config, parents={"embeddings": [embeddings]}, stage_version=VERSION, duration_s=0.0)


def _copy_part(source: str, target: str, touched: pa.Array) -> int:
    """Copy the rows of ``source`` whose ids are not ``touched`` to ``target``; return their number."""
    filesystem, path = storage.arrow_filesystem(source)
    ids = pq.read_table(path, columns=["image_id"], filesystem=filesystem)["image_id"]
    keep = pc.invert(pc.is_in(ids, touched))
    num_kept = int(pc.sum(keep).as_py() or 0)
    if num_kept == len(ids):
        storage.share_file(source, target)
    elif num_kept:
        file, (out, to) = pq.ParquetFile(path, filesystem=filesystem), storage.arrow_filesystem(target)
        with pq.ParquetWriter(to, file.schema_arrow, filesystem=out, use_dictionary=False) as writer:
            for batch in file.iter_batches(BATCH_ROWS):
                writer.write_batch(batch.filter(pc.invert(pc.is_in(batch.column("image_id"), touched))))
    return num_kept


def _write(table: pa.Table, uri: str) -> None:
    filesystem, path = storage.arrow_filesystem(uri)
    pq.write_table(table, path, filesystem=filesystem, use_dictionary=False)


def make_table(rows: Sequence[pb.Row], schema: pa.Schema) -> pa.Table:
    """Written rows as a table of ``schema``; columns that they do not name are null."""
    kind = schema.field("vector").type
    numbers = np.frombuffer(b"".join(row.vector for row in rows), "<f4")
    values = pa.array(numbers.astype(kind.value_type.to_pandas_dtype()))
    columns: dict[str, Any] = {
        "image_id": pa.array([row.id for row in rows]),
        "vector": pa.FixedSizeListArray.from_arrays(values, kind.list_size).cast(kind),
    }
    for field in schema:
        if field.name not in columns:
            texts = pa.array([row.metadata.get(field.name) for row in rows], pa.string())
            columns[field.name] = texts.cast(field.type)
    return pa.table([columns[field.name] for field in schema], schema=schema)


def compact(index: str, records: Sequence[WriteRecord], folder: str) -> str:
    """Publish the index at ``index`` with the writes merged in, under ``folder``; its URI."""
    with storage.exclusive(storage.join(folder, ROOT, COMPACTING), _tell_waiting):
        return _compact(Artifact.open(index, "index", check=False), records, folder)


def _compact(base: Artifact, records: Sequence[WriteRecord], folder: str) -> str:
    embeddings = find_embeddings(base)
    check_space(base, embeddings, records, folder)
    merged = merge_embeddings(embeddings, records, storage.join(folder, ROOT))
    stage = get_stage("index")
    config = stage.config.model_validate(base.manifest.config)
    inputs = {"embeddings": [merged], "previous": [base]}
    with background():  # replicas may have reserved every CPU
        return execute(stage, config, inputs, storage.join(folder, ROOT), base.manifest.name).uri


def check_space(base: Artifact, embeddings: Artifact, records: Sequence[WriteRecord], folder: str) -> None:
    """Raise ``LookalikeError`` if the disk of ``folder`` has no room for what compaction writes, and for the log."""
    needed, free = estimate_bytes(base, embeddings, records), storage.free_bytes(folder)
    if needed + SPARE_BYTES > free:
        raise LookalikeError(
            f"compaction needs about {needed >> 20} MiB beside {SPARE_BYTES >> 20} MiB for the log of writes, the disk "
            f"of {folder} has {free >> 20} MiB; free some, or lower writes.keep_hours"
        )


def estimate_bytes(base: Artifact, embeddings: Artifact, records: Sequence[WriteRecord]) -> int:
    """About how many bytes a compaction writes: parts with touched rows, and for each shard the rows, or all of it.

    A shard is built whole if its touched rows are more than may be appended; then this is what it takes today.
    """
    rows, meta = final_rows(records), read_index_meta(base)
    written: int = sum(row.ByteSize() for row in rows.values() if row is not None)
    touched = pa.array(rows, pa.string())
    sizes = {embeddings.path(file.path): file.size_bytes for file in embeddings.manifest.files}
    parts = sum(sizes[part] for part in embeddings.files("part-", ".parquet") if _has_some(part, touched))
    shards = Counter(shard_of(image_id, meta.num_hash_shards) for image_id in rows)
    return 2 * written + parts + sum(_shard_bytes(base, meta, shard, num) for shard, num in shards.items())


def _has_some(part: str, touched: pa.Array) -> bool:
    filesystem, path = storage.arrow_filesystem(part)
    ids = pq.read_table(path, columns=["image_id"], filesystem=filesystem)["image_id"]
    return bool(pc.any(pc.is_in(ids, touched)).as_py())


def _shard_bytes(base: Artifact, meta: IndexMeta, shard: int, num_touched: int) -> int:
    owners = meta.hash_shards or range(meta.num_shards)
    places = [place for place, owner in enumerate(owners) if owner == shard]
    folders = tuple(f"{meta.shards[place]}/" for place in places)
    size = sum(file.size_bytes for file in base.manifest.files if file.path.startswith(folders))
    num_rows = sum(meta.shard_rows[place] for place in places)
    share = num_touched / max(1, num_rows)
    options = base.manifest.config
    is_appended = share <= options.get("append_share", 0) and len(places) < options.get("max_segments", 1)
    return int(size * share) if is_appended else int(size * (1 + share))


def held_writes(index: str, folder: str) -> int:
    """Number of the last write of the service in ``folder`` that an index holds, by its lineage; 0 for none."""
    root, numbers = storage.join(folder, ROOT) + "/", [0]
    for _, _, ancestor in lineage(Artifact.open(index, "index", check=False), roots=[root]):
        if isinstance(ancestor, Artifact) and ancestor.uri.startswith(root):
            numbers += ancestor.manifest.config.get("writes", [])
    return max(numbers)


def find_embeddings(index: Artifact) -> Artifact:
    """The embeddings that an index was made from; ``ArtifactError`` when they are gone."""
    for name, _, uri in index.parents():
        if name == "embeddings":
            try:
                return Artifact.open(uri, "embeddings", check=False)
            except ArtifactError as error:
                raise ArtifactError(
                    f"the writes cannot be merged: the embeddings that {index.uri} was made from are "
                    f"needed, and {error}"
                ) from None
    raise ArtifactError(f"{index.uri} names no embeddings that it was made from; build it with `lookalike index`")


@lru_cache(8)
def read_where(index: str) -> dict[str, list[str]]:
    """Conditions that all rows of an index meet: column -> allowed values."""
    conditions: dict[str, list[str]] = Artifact.open(index, check=False).manifest.config.get("where") or {}
    return conditions


def check_kept(row: pb.Row, where: dict[str, list[str]]) -> None:
    """Refuse a row that the index leaves out: the next compaction would lose it."""
    for column, values in where.items():
        if row.metadata.get(column) not in values:
            raise invalid(
                f"row {row.id!r} has {column}={row.metadata.get(column)!r}; this index holds only rows with "
                f"{column} in {values}: set it in the metadata"
            )


async def compact_in_task(index: str, records: Sequence[WriteRecord], folder: str) -> str:
    """:func:`compact` as a Ray task, outside the writer's process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # has the folder
    task = ray.remote(num_cpus=0, max_retries=1)(compact).options(scheduling_strategy=here)
    try:
        return str(await task.remote(index, records, folder))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (LookalikeError, OSError)):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise RetrievalError(
            grpc.StatusCode.UNAVAILABLE,
            f"not compacted: the process that builds the index is lost ({type(error).__name__}: {str(error)[:200]}); "
            "nothing has changed, try again",
        ) from None
