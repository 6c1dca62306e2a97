"""Index stage: embeddings -> shards of a prefix store with shortlist indexes, one Ray task a shard.

A row belongs to the shard that the hash of its id names and is sorted by id within it, so an index depends neither on
the order of the embeddings nor on the number of workers. A task reads the ids of all parts twice (to count, to choose)
and the vectors of all parts once, batch by batch: S shards read the embeddings S times, and hold the ids of their own
rows, one batch of vectors, and one prefix while its shortlist is built.
"""

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.cluster import ensure_ray
from lookalike.config import runtime
from lookalike.errors import ArtifactError, LookalikeError, UsageError
from lookalike.progress import track
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.searcher import INDEX_META, EncoderRef, IndexMeta, shard_of
from lookalike.retrieval.shortlist import SHORTLISTS, ShortlistOptions, build_shortlist, shortlist_name
from lookalike.retrieval.store import (
    ROWS_FILE,
    SHARD_META,
    Dtype,
    PrefixStore,
    ShardMeta,
    check_dims,
    read_meta,
    write_store,
)
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
COLUMNS = tuple(name for name in schemas.embeddings(1).names if name != "vector")


class IndexConfig(StageConfig, ShortlistOptions):
    """What is indexed, and how."""

    num_shards: int = Field(default=2, ge=1, le=10_000)
    """Shards, each of which may be served by its own replicas."""
    dims: tuple[int, ...] | None = None
    """Prefixes that can be searched; the model's nested dims by default. The full dim is always among them."""
    shortlist: str = "graph"
    """Index type of the shortlists: flat, hnsw, graph, hnsw-sq8, ivf, ivf-pq, ivf-rabitq, binary or
    one registered."""
    shortlist_dims: tuple[int, ...] | None = None
    """Prefixes to build a shortlist index over; all dims but the full one by default. The plan picks among them."""
    dtype: Dtype = "float32"
    """Number format of the stored vectors; float16 halves the index and costs about 1e-4 in a cosine, int8 makes it a
    quarter and costs about 1e-3."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Keep only rows whose column has one of the values, as in {"view": ["icon"]}; all conditions must hold."""
    batch_rows: int = runtime(16_384, ge=1, le=1 << 24)
    """Vectors read at a time, in rows."""

    @field_validator("shortlist")
    @classmethod
    def _known(cls, shortlist: str) -> str:
        SHORTLISTS.get(shortlist)  # an unknown name lists the valid ones
        return shortlist


@dataclass(frozen=True)
class Source:
    """The rows of an embeddings artifact that an index takes: plain values, sent to Ray tasks."""

    parts: list[str]
    dim: int
    where: dict[str, list[str]]

    def table(self, part: str) -> tuple[pa.Table, Rows]:
        """Id and metadata of one part's rows that match ``where``, and their places in the part."""
        file = _open_parquet(part)
        schemas.require_columns(file.schema_arrow.empty_table(), schemas.embeddings(self.dim), part)
        table = file.read(columns=list(COLUMNS))
        keep = np.ones(len(table), bool)
        for column, values in self.where.items():
            keep &= pc.is_in(table[column], pa.array(values, pa.string())).to_numpy(zero_copy_only=False).astype(bool)
        places = np.flatnonzero(keep)
        return table.take(pa.array(places)), places

    def vectors(self, part: str, places: Rows, batch_rows: int) -> Iterator[tuple[slice, Floats]]:
        """Raw vectors at rising ``places`` of one part: (slice of ``places``, float32 [m, dim])."""
        first = 0
        for batch in _open_parquet(part).iter_batches(batch_size=batch_rows, columns=["vector"]):
            chosen = slice(*np.searchsorted(places, [first, first + len(batch)]))
            if chosen.stop > chosen.start:
                column = batch.column(0)
                if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != self.dim:
                    raise ArtifactError(f"{part} holds {column.type} where vectors of {self.dim} numbers are expected")
                numbers = column.take(pa.array(places[chosen] - first)).flatten().to_numpy(zero_copy_only=False)
                yield chosen, numbers.astype(np.float32).reshape(-1, self.dim)
            first += len(batch)


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(uri)
    return pq.ParquetFile(path, filesystem=filesystem)


def count_rows(source: Source, part: str, num_shards: int) -> list[int]:
    """How many of one part's rows go to each shard."""
    table, _ = source.table(part)
    return [int(count) for count in np.bincount(_shards_of(table, num_shards), minlength=num_shards)]


def _shards_of(table: pa.Table, num_shards: int) -> Rows:
    return np.array([shard_of(image_id, num_shards) for image_id in table["image_id"].to_pylist()], dtype=np.int64)


def collect_rows(source: Source, shard: int, num_shards: int) -> tuple[pa.Table, list[Rows], list[Rows]]:
    """One shard's metadata sorted by id, and for each part the places to read and the rows they become."""
    tables, places = [], []
    for part in source.parts:
        table, found = source.table(part)
        mine = np.flatnonzero(_shards_of(table, num_shards) == shard)
        tables.append(table.take(pa.array(mine)))
        places.append(found[mine])
    table = pa.concat_tables(tables)
    order = pc.sort_indices(table["image_id"]).to_numpy()
    table = table.take(pa.array(order))
    ids = table["image_id"].to_pylist()
    for one, other in pairwise(ids):
        if one == other:
            raise ArtifactError(f"image_id {one!r} occurs twice in the embeddings, where ids must be unique; make the "
                                "corpus and the embeddings again")  # fmt: skip
    rows = np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order))
    borders = np.cumsum([len(found) for found in places])[:-1]
    return table, places, np.split(rows, borders)


def build_shard(source: Source, config: IndexConfig, meta: ShardMeta, shard: int, folder: str) -> ShardMeta:
    """Fill a local, empty ``folder`` with one shard; ``shard.json`` comes last."""
    table, places, rows = collect_rows(source, shard, config.num_shards)
    assert len(table) == meta.num_rows, "the parts changed while the index was built"

    def batches() -> Iterable[tuple[Rows, Floats]]:
        for part, here, there in zip(source.parts, places, rows, strict=True):
            for chosen, vectors in source.vectors(part, here, config.batch_rows):
                finite = np.isfinite(vectors).all(axis=1)
                if not finite.all():
                    bad = table["image_id"][int(there[chosen][~finite][0])].as_py()
                    raise ArtifactError(f"the vector of {bad!r} in {part} holds NaN or infinity; embed again")
                yield there[chosen], vectors

    meta = write_store(folder, meta, table, batches())
    store = PrefixStore(folder, meta)
    for dim in meta.shortlist_dims:
        built = build_shortlist(meta.shortlist, store.unit_prefix(dim), config)
        built.save(f"{folder}/{shortlist_name(dim, meta.shortlist)}")
    storage.write_atomic(f"{folder}/{SHARD_META}", meta.model_dump_json(indent=1).encode())
    return meta


def place_shard(source: Source, config: IndexConfig, meta: ShardMeta, shard: int, uris: tuple[str, str]) -> ShardMeta:
    """Build one shard in scratch space and move it to its folder, unless a finished one is there.

    ``uris`` are the shard's folder and the folder for scratch. On a local disk the move is a rename, so that an
    attempt that was killed, or one that still runs, cannot mix with this one; elsewhere ``shard.json`` goes up last.
    """
    uri, scratch = uris
    if storage.exists(storage.join(uri, SHARD_META)):
        return read_meta(uri)
    storage.remove_tree(uri)
    if storage.is_local(uri):
        folder = f"{storage.local_path(scratch)}/{shard:05d}-{uuid.uuid4().hex[:8]}"
        os.makedirs(folder)
        done = build_shard(source, config, meta, shard, folder)
        os.rename(folder, storage.local_path(uri))
        return done
    with tempfile.TemporaryDirectory(prefix="lookalike-shard-") as folder:
        done = build_shard(source, config, meta, shard, folder)
        filesystem, path = storage.resolve(uri)
        filesystem.makedirs(path, exist_ok=True)
        for name in sorted(os.listdir(folder), key=lambda name: name == SHARD_META):
            filesystem.put_file(f"{folder}/{name}", f"{path}/{name}")
    return done


def choose_dims(config: IndexConfig, model_dims: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(nested dims, shortlist dims) of the index; ``UsageError`` when the model does not have them."""
    full = model_dims[-1]
    for name, dims in (("dims", config.dims), ("shortlist_dims", config.shortlist_dims)):
        too_large = [dim for dim in dims or () if dim > full]
        if too_large:
            raise UsageError(f"{name} {list(dims or ())} exceed the model's {full}; drop {too_large} or train a model "
                             f"with embedding.dim={max(too_large)}")  # fmt: skip
    dims = tuple(sorted({*(config.dims or model_dims), full}))
    check_dims(dims)
    shortlist_dims = dims[:-1] or dims if config.shortlist_dims is None else tuple(sorted(set(config.shortlist_dims)))
    unknown = [dim for dim in shortlist_dims if dim not in dims]
    if unknown:
        raise UsageError(f"shortlist_dims {unknown} are not among the index's dims {list(dims)}; choose from these or "
                         "add them to dims")  # fmt: skip
    return dims, shortlist_dims


def read_source(embeddings: Artifact, where: dict[str, list[str]]) -> Source:
    """Where the rows of an embeddings artifact are; ``UsageError`` for a column it does not carry."""
    unknown = [column for column in where if column not in COLUMNS]
    if unknown:
        raise UsageError(f"where names columns {unknown}; embeddings carry {', '.join(COLUMNS)}")
    parts = embeddings.files("part-", ".parquet")
    if not parts:
        raise ArtifactError(f"{embeddings.uri} holds no part-*.parquet; run embed again")
    return Source(parts, int(embeddings.read_json("meta.json")["dim"]), where)


def run(stage: StageRun[IndexConfig]) -> None:
    """Build all shards and write ``meta.json``."""
    config, embeddings = stage.config, stage.one("embeddings")
    facts = embeddings.read_json("meta.json")
    SHORTLISTS.get(config.shortlist)
    dims, shortlist_dims = choose_dims(config, [int(dim) for dim in facts["dims"]])
    source = read_source(embeddings, config.where)
    ensure_ray()
    counting = [(source, part, config.num_shards) for part in source.parts]
    counts = np.sum(_map_tasks(count_rows, counting, "count rows"), axis=0)
    if not counts.sum():
        raise UsageError(f"where {config.where} keeps none of the {facts['rows']} embeddings; check its values")
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
    wanted = [
        ShardMeta(num_rows=int(rows), row_offset=int(offset), dims=dims, dtype=config.dtype,
                  shortlist=config.shortlist, shortlist_dims=shortlist_dims)
        for rows, offset in zip(counts, offsets, strict=True)
    ]  # fmt: skip
    names = [f"shard-{shard:05d}" for shard in range(config.num_shards)]
    tasks = [(source, config, meta, n, (stage.out.path(name), stage.out.work("scratch")))
             for n, (name, meta) in enumerate(zip(names, wanted, strict=True))]  # fmt: skip
    shards: list[ShardMeta] = _map_tasks(place_shard, tasks, "index shards")
    meta = IndexMeta(
        dims=dims, num_rows=int(counts.sum()), shards=tuple(names), shard_rows=tuple(int(rows) for rows in counts),
        dtype=config.dtype, shortlist=config.shortlist, shortlist_dims=shortlist_dims, columns=COLUMNS,
        encoder=EncoderRef(**{key: str(facts["encoder"].get(key, "")) for key in ("fingerprint", "name", "uri")}),
    )  # fmt: skip
    stage.out.write_json(INDEX_META, meta.model_dump(mode="json", exclude={"generation"}))
    stage.out.stats |= _statistics(stage, meta, shards)


def _statistics(stage: StageRun[IndexConfig], meta: IndexMeta, shards: list[ShardMeta]) -> dict[str, Any]:
    sizes = {name: storage.size_bytes(stage.out.path(name)) for name in storage.list_files(stage.out.uri)
             if name.startswith("shard-")}  # fmt: skip
    vectors = sum(size for name, size in sizes.items() if name.endswith(".npy"))
    shortlists = {
        str(dim): sum(size for name, size in sizes.items() if name.endswith(shortlist_name(dim, meta.shortlist)))
        for dim in meta.shortlist_dims
    }
    num_zero = sum(shard.num_zero for shard in shards)
    if num_zero:
        log.warning("vectors of length zero %s", fields(rows=num_zero, effect="they score 0 for every query"))
    if 0 in meta.shard_rows:
        log.warning("empty shards %s", fields(shards=meta.shard_rows.count(0), remedy="lower num_shards"))
    return {
        "rows": meta.num_rows, "rows_per_shard": list(meta.shard_rows), "dims": list(meta.dims),
        "zero_vectors": num_zero, "vector_bytes": vectors, "shortlist_bytes": shortlists,
        "metadata_bytes": sum(size for name, size in sizes.items() if name.endswith(ROWS_FILE)),
    }  # fmt: skip


def _map_tasks(function: Any, arguments: list[tuple[Any, ...]], description: str) -> list[Any]:
    """``function`` over ``arguments`` as Ray tasks, results in order; our own errors come out as they were raised."""
    import ray

    task = ray.remote(num_cpus=1)(function)
    references = [task.remote(*values) for values in arguments]
    try:
        return [ray.get(reference) for reference in track(references, description)]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LookalikeError):
            raise error.cause from None
        raise


STAGE: Stage[IndexConfig] = Stage(
    name="index", kind="index", config=IndexConfig, run=run, inputs={"embeddings": Input("embeddings")}, resumable=True
)
