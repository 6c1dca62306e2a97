"""Index stage: embeddings -> shards of a prefix store with shortlist indexes, one Ray task per shard.

A row belongs to the shard that the hash of its id names; within a shard, rows are sorted by id. So an index depends
neither on the order of the embeddings nor on the number of workers. A task reads the ids of all parts twice (to count
them, to choose among them) and the vectors once, batch by batch: S shards read the embeddings S times. A task holds the
ids of its rows, one batch of vectors, and one prefix while it builds the shortlist.

With a ``previous`` index a build keeps what has not changed (``segments.py``). A shard then reads the vectors of parts
that are new to the index once to compare them, and the row groups with rows to build once more.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.cluster import background_processes, ensure_ray
from lookalike.errors import LookalikeError, UsageError
from lookalike.outlook import Outlook, require_values
from lookalike.progress import track
from lookalike.retrieval.index_meta import INDEX_META, EncoderRef, IndexMeta, read_index_meta
from lookalike.retrieval.index_types import SHORTLISTS, ShortlistOptions
from lookalike.retrieval.ranking import Floats, Mask, Rows
from lookalike.retrieval.shard_meta import (
    DIGESTS_FILE,
    ROWS_FILE,
    SHARD_META,
    TOMBSTONES_FILE,
    Dtype,
    ShardMeta,
    check_dims,
    read_meta,
)
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from lookalike.serve.index.rows import (
    COLUMNS,
    EmbeddingRows,
    collect_rows,
    count_rows,
    digest_rows,
    read_source,
    read_vectors,
)
from lookalike.serve.index.segments import (
    KINDS,
    Previous,
    SegmentOptions,
    ShardChange,
    Uris,
    build_facts,
    compare_shard,
    explain_difference,
    keep_segment,
    new_folder,
    read_mask,
)
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


class IndexConfig(StageConfig, SegmentOptions, ShortlistOptions):
    """Which rows are indexed, and how."""

    dims: tuple[int, ...] | None = None
    """Prefixes that can be searched; the model's nested dims by default. The full dim is always among them."""
    shortlist: str = "graph"
    """Index type of the shortlists: flat, hnsw, graph, hnsw-sq8, ivf, ivf-pq, ivf-rabitq, binary, binary-signs, or a
    registered type."""
    shortlist_dims: tuple[int, ...] | None = None
    """Prefixes to build a shortlist index over; all dims but the full one by default. The plan picks among them."""
    dtype: Dtype = "float32"
    """Number format of the stored vectors. float16 halves the index and changes cosines by about 1e-4; int8 quarters it
    and changes them by about 1e-3."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Keep only rows whose column has one of the values, as in {"view": ["icon"]}; all conditions must hold."""

    @field_validator("shortlist")
    @classmethod
    def _known(cls, shortlist: str) -> str:
        SHORTLISTS.get(shortlist)  # an unknown name lists the valid ones
        return shortlist


class Segment(NamedTuple):
    """A shard folder to make. Plain values, so that Ray tasks can take them."""

    name: str
    shard: int
    """Its hash shard."""
    meta: ShardMeta
    kept: str | None = None
    """The folder of the previous index to keep here; None for a folder to build."""
    work: str | None = None
    """Path of the masks of rows to build or to keep (``compare_shard``); None for all rows of the hash shard."""


def build_shard(
    source: EmbeddingRows, config: IndexConfig, meta: ShardMeta, shard: int, folder: str, *, only: Mask | None = None
) -> ShardMeta:
    """Fill a local, empty ``folder`` with one shard, or with its rows in ``only``; ``shard.json`` comes last."""
    meta = _write_rows(source, config, meta, shard, folder, only=only)
    store = PrefixStore(folder, meta)
    for dim in meta.shortlist_dims:
        built = build_shortlist(meta.shortlist, store.unit_prefix(dim), config)
        built.save(f"{folder}/{shortlist_name(dim, meta.shortlist)}")
    storage.write_atomic(f"{folder}/{SHARD_META}", meta.model_dump_json(indent=1).encode())
    return meta


def _write_rows(
    source: EmbeddingRows, config: IndexConfig, meta: ShardMeta, shard: int, folder: str, *, only: Mask | None
) -> ShardMeta:
    """Write everything except shortlists, so that ids and metadata are out of memory when these are built."""
    shard_rows = collect_rows(source, shard, config.num_shards)
    shard_rows = shard_rows if only is None else shard_rows.only(only)
    assert len(shard_rows.table) == meta.num_rows, "the parts changed while the index was built"
    digests = np.empty((1, meta.num_rows), "<u8")

    def batches() -> Iterable[tuple[Rows, Floats]]:
        for rows, vectors in read_vectors(source, shard_rows, config.batch_rows):
            digests[0, rows] = digest_rows(shard_rows.table.take(rows), vectors)
            yield rows, vectors

    meta = write_store(folder, meta, shard_rows.table, batches())
    np.save(f"{folder}/{DIGESTS_FILE}", digests)
    return meta


def place_shard(
    source: EmbeddingRows, config: IndexConfig, meta: ShardMeta, shard: int, uris: Uris, *, only: Mask | None = None
) -> ShardMeta:
    """Build one shard and put it into its folder; ``uris`` are that folder and the scratch folder."""
    if storage.is_local(uris[0]):
        with new_folder(*uris) as folder:
            return build_shard(source, config, meta, shard, folder, only=only)
    with tempfile.TemporaryDirectory(prefix="lookalike-shard-") as folder, new_folder(*uris) as uri:
        done = build_shard(source, config, meta, shard, folder, only=only)
        filesystem, path = storage.resolve(uri)
        for name in sorted(os.listdir(folder), key=lambda name: name == SHARD_META):
            filesystem.put_file(f"{folder}/{name}", f"{path}/{name}")
    return done


def place_segment(
    source: EmbeddingRows, config: IndexConfig, previous: Previous | None, segment: Segment, uris: Uris
) -> ShardMeta:
    """Build or keep a segment, unless it is already there."""
    if storage.exists(storage.join(uris[0], SHARD_META)):
        return read_meta(uris[0])
    if previous is not None and segment.kept is not None and segment.work is not None:
        return keep_segment(previous, segment.kept, segment.meta, segment.work, uris)
    only = None if segment.work is None else read_mask(segment.work, "fresh")
    return place_shard(source, config, segment.meta, segment.shard, uris, only=only)


def choose_dims(config: IndexConfig, model_dims: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (nested dims, shortlist dims) of the index; ``UsageError`` if the model does not have them."""
    full = model_dims[-1]
    for name, dims in (("dims", config.dims), ("shortlist_dims", config.shortlist_dims)):
        if too_large := [dim for dim in dims or () if dim > full]:
            raise UsageError(
                f"{name} {list(dims or ())} exceed the model's {full}; drop {too_large} or train a model "
                f"with embedding.dim={max(too_large)}"
            )
    dims = tuple(sorted({*(config.dims or model_dims), full}))
    check_dims(dims)
    shortlist_dims = dims[:-1] or dims if config.shortlist_dims is None else tuple(sorted(set(config.shortlist_dims)))
    if unknown := [dim for dim in shortlist_dims if dim not in dims]:
        raise UsageError(
            f"shortlist_dims {unknown} are not among the index's dims {list(dims)}; choose from these or "
            "add them to dims"
        )
    return dims, shortlist_dims


def find_previous(stage: StageRun[IndexConfig], wanted: IndexMeta) -> tuple[Previous | None, str]:
    """Return the previous index, or None and why no part of it can be kept (empty without a previous index)."""
    artifact = next(iter(stage.many("previous")), None)
    if artifact is None:
        return None, ""
    old = read_index_meta(artifact)
    reason = explain_difference(
        build_facts(old, artifact.manifest.stage_version, artifact.manifest.config),
        build_facts(wanted, STAGE.version, stage.config.model_dump(mode="json")),
    )
    if reason:
        log.warning("nothing is kept %s", fields(previous=artifact.uri, reason=reason, effect="all shards are built"))
        return None, reason
    return Previous.of(artifact, old, stage.config.where), ""


def find_changes(stage: StageRun[IndexConfig], source: EmbeddingRows, previous: Previous | None) -> list[ShardChange]:
    """Return what to do with each hash shard."""
    num_shards = stage.config.num_shards
    if previous is not None:
        tasks = [(source, stage.config, previous, shard, _work(stage, shard)) for shard in range(num_shards)]
        return map_tasks(compare_shard, tasks, "compare shards")
    counting = [(source, part, num_shards) for part in source.parts]
    counts = np.sum(map_tasks(count_rows, counting, "count rows"), axis=0)
    return [ShardChange(kind="rebuilt", num_fresh=int(rows)) for rows in counts]


def _work(stage: StageRun[IndexConfig], shard: int) -> str:
    return stage.out.work("changes", f"{shard:05d}")


def list_segments(
    stage: StageRun[IndexConfig], template: ShardMeta, previous: Previous | None, changes: list[ShardChange]
) -> list[Segment]:
    """Return all folders of the index in the order of their rows: per hash shard the kept ones, then the new one."""
    segments: list[Segment] = []
    offset = 0

    def add(shard: int, position: int, meta: ShardMeta, kept: str | None, work: str | None) -> None:
        nonlocal offset
        name = f"shard-{shard:05d}" + (f"-{position:03d}" if position else "")
        segments.append(Segment(name, shard, meta.model_copy(update={"row_offset": offset}), kept, work))
        offset += meta.num_rows

    for shard, change in enumerate(changes):
        for position, kept in enumerate(change.kept):
            assert previous is not None, "segments are kept from a previous index"
            meta = read_meta(storage.join(previous.uri, kept.folder))
            meta = meta.model_copy(update={"num_deleted": kept.num_deleted})
            add(shard, position, meta, kept.folder, _work(stage, shard))
        if change.num_fresh or not change.kept:
            work = _work(stage, shard) if change.kept else None
            add(shard, len(change.kept), template.model_copy(update={"num_rows": change.num_fresh}), None, work)
    return segments


def run(stage: StageRun[IndexConfig]) -> None:
    """Build all shards, or only what has changed, and write ``meta.json``."""
    config, embeddings = stage.config, stage.one("embeddings")
    facts = embeddings.read_json("meta.json")
    dims, shortlist_dims = choose_dims(config, [int(dim) for dim in facts["dims"]])
    source = read_source(embeddings, config.where)
    same: dict[str, Any] = {"dtype": config.dtype, "shortlist": config.shortlist}
    same |= {"dims": dims, "shortlist_dims": shortlist_dims}
    encoder = EncoderRef(**{key: facts["encoder"][key] for key in EncoderRef.model_fields if key in facts["encoder"]})
    shards = tuple(f"shard-{shard:05d}" for shard in range(config.num_shards))
    meta = IndexMeta(num_rows=0, shards=shards, shard_rows=(0,) * len(shards), columns=COLUMNS, encoder=encoder, **same)
    previous, reason = find_previous(stage, meta)
    changes = find_changes(stage, source, previous)
    segments = list_segments(stage, ShardMeta(num_rows=0, row_offset=0, **same), previous, changes)
    if all(segment.meta.num_rows == segment.meta.num_deleted for segment in segments):
        raise UsageError(f"where {config.where} keeps none of the {facts['rows']} embeddings; check its values")
    scratch, path = stage.out.work("scratch"), stage.out.path
    tasks = [(source, config, previous, segment, (path(segment.name), scratch)) for segment in segments]
    built: list[ShardMeta] = map_tasks(place_segment, tasks, "index shards")
    meta = meta.model_copy(
        update={
            "num_rows": sum(shard.num_rows for shard in built),
            "num_deleted": sum(shard.num_deleted for shard in built),
            "shards": tuple(segment.name for segment in segments),
            "shard_rows": tuple(shard.num_rows for shard in built),
            "hash_shards": tuple(segment.shard for segment in segments),
        }
    )
    left_out: dict[str, Any] = {"generation": True} | ({} if encoder.external else {"encoder": {"external"}})
    stage.out.write_json(INDEX_META, meta.model_dump(mode="json", exclude=left_out))
    kinds = [change.kind for change in changes]
    stage.out.stats |= _statistics(stage, meta, built) | {f"shards_{kind}": kinds.count(kind) for kind in KINDS}
    stage.out.stats |= {"nothing_kept_because": reason} if reason else {}


def _statistics(stage: StageRun[IndexConfig], meta: IndexMeta, shards: list[ShardMeta]) -> dict[str, Any]:
    names = [name for name in storage.list_files(stage.out.uri) if name.startswith("shard-")]
    sizes = {name: storage.size_bytes(stage.out.path(name)) for name in names}
    marks = (DIGESTS_FILE, TOMBSTONES_FILE)
    vectors = sum(size for name, size in sizes.items() if name.endswith(".npy") and not name.endswith(marks))
    shortlists = {
        str(dim): sum(size for name, size in sizes.items() if name.endswith(shortlist_name(dim, meta.shortlist)))
        for dim in meta.shortlist_dims
    }
    if num_zero := sum(shard.num_zero for shard in shards):
        log.warning("vectors of length zero %s", fields(rows=num_zero, effect="they score 0 for every query"))
    if 0 in meta.shard_rows:
        log.warning("empty shards %s", fields(shards=meta.shard_rows.count(0), remedy="lower num_shards"))
    return {
        "rows": meta.num_live,
        "deleted_rows": meta.num_deleted,
        "rows_per_shard": list(meta.shard_rows),
        "dims": list(meta.dims),
        "zero_vectors": num_zero,
        "vector_bytes": vectors,
        "shortlist_bytes": shortlists,
        "metadata_bytes": sum(size for name, size in sizes.items() if name.endswith(ROWS_FILE)),
    }


def map_tasks(function: Any, arguments: list[tuple[Any, ...]], description: str) -> list[Any]:
    """Run ``function`` for each of ``arguments`` as a Ray task; return the results in order, raise our own errors.

    In the background the tasks reserve nothing, and are no more at a time than CPUs were free at the start; if none
    was, the work is done in this process.
    """
    import ray

    at_most = background_processes()
    if at_most == 1:
        return [function(*values) for values in track(arguments, description)]
    ensure_ray()
    task = ray.remote(num_cpus=1 if at_most is None else 0)(function)
    references: list[Any] = []
    try:
        for number, values in enumerate(arguments):
            if at_most is not None and number >= at_most:
                ray.wait(references, num_returns=number - at_most + 1)
            references.append(task.remote(*values))
        return [ray.get(reference) for reference in track(references, description)]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LookalikeError):
            raise error.cause from None
        raise


def foresee(config: IndexConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: rows that ``where`` keeps."""
    for outlook in given["embeddings"].values():
        require_values(outlook, "where", config.where, COLUMNS)
    return {}


STAGE: Stage[IndexConfig] = Stage(
    name="index",
    kind="index",
    config=IndexConfig,
    run=run,
    foresee=foresee,
    resumable=True,
    version=3,
    inputs={"embeddings": Input("embeddings"), "previous": Input("index", optional=True)},
)
