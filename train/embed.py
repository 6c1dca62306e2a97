"""``lookalike embed``: a corpus through an encoder, on an actor pool of Ray Data.

A file of the corpus becomes a part file; its row groups are embedded one after the other and kept as they are done, so
a run that was killed goes on with the row group it was at. On CPUs an actor decodes its own images, and neither pixels
nor vectors cross the object store. GPU actors are fed by CPU tasks, on whatever nodes have CPUs: the pixels of a row
group travel as bytes, as many at a time as Ray Data's share of the object store holds. The driver knows files, of some
thousand images each, never images.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lookalike import schemas, storage
from lookalike.artifacts import Artifact, Draft
from lookalike.config import runtime
from lookalike.errors import ArtifactError, LookalikeError, UsageError
from lookalike.progress import progress_bar
from lookalike.registry import nearest
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.train.loader import Unit, list_units, read_unit
from lookalike.vision.encoder import Encoder, Precision, read_config, read_pixels
from lookalike.vision.images import ImageError
from lookalike.vision.transforms import TransformConfig

WITHOUT_IMAGE = [name for name in schemas.CORPUS.names if name != "image"]
CARRIED = ("group", "view", "split", "dataset", "category", "title")
MAX_BLOCKS = 4096  # the driver keeps a reference a block; more files than this share blocks
Task = dict[str, Any]
"""A file of the corpus: its ``uri`` and ``number``; with ``row_group`` and its ``pixels`` when a decoder made them."""


class EmbedConfig(StageConfig):
    """Which rows to embed, how to store the vectors, how many actors work."""

    where: dict[str, list[str]] = {}
    """Keep only rows whose column has one of these values, for example ``{"dataset": ["furniture"]}``."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the vectors."""
    precision: Precision = "float32"
    """Of the encoder's matrix products; ``bfloat16`` also works on CPUs, ``float16`` on GPUs alone."""
    num_actors: int = runtime(2, ge=1)
    """Encoder replicas."""
    cpus_per_actor: int = runtime(1, ge=1)
    """CPUs and torch threads of each."""
    gpus_per_actor: float = runtime(0.0, ge=0.0)
    """GPUs of each; above 0, images are decoded by CPU tasks."""
    decoders: int | None = runtime(None, ge=0)
    """CPU tasks that decode at a time; 0 leaves it to the actors. None means 0 on CPUs, for GPUs all CPUs left."""
    batch_size: int = Field(32, ge=1, json_schema_extra={"runtime": True})
    """Images a forward pass."""


class EmbedFile:
    """Actor: embeds files of the corpus and writes their parts; row groups that are done already are left alone."""

    def __init__(self, encoder_uri: str, folder: str, work: str, config: EmbedConfig) -> None:
        import torch

        torch.set_num_threads(config.cpus_per_actor)
        self.encoder = Encoder.load(encoder_uri, precision=config.precision)
        self.folder, self.work, self.config = folder, work, config

    def __call__(self, task: Task) -> dict[str, int]:
        """Embed a whole file, or the row group whose pixels came along; returns the rows looked at."""
        sizes = row_group_sizes(task["uri"])
        groups = [task["row_group"]] if "pixels" in task else range(len(sizes))
        for group in groups:
            self._embed(task, group)
        done = storage.list_files(group_folder(self.work, task["number"]))
        if len(done) == len(sizes):  # whoever finishes the last one; two at once write the same bytes
            join_groups(storage.join(self.folder, part_name(task["number"])), self.work, task["number"], done)
        return {"rows": sum(sizes[group] for group in groups)}

    def _embed(self, task: Task, group: int) -> None:
        target = storage.join(group_folder(self.work, task["number"]), f"{group:05d}.parquet")
        if storage.exists(target):
            return
        pixels = task.get("pixels")
        columns = None if pixels is None else WITHOUT_IMAGE
        table = select_rows(read_group(task["uri"], group, columns), self.config.where)
        vectors = self._vectors(table, f"row group {group} of {task['uri']}", pixels)
        write_part(target, embedding_table(table, vectors, self.config.dtype))

    def _vectors(self, table: pa.Table, where: str, pixels: bytes | None) -> npt.NDArray[np.float32]:
        size, transform, parts = self.config.batch_size, self.encoder.config.transform, []
        whole = None if pixels is None else unpack_pixels(pixels, transform)
        for start in range(0, table.num_rows, size):
            batch = table.slice(start, size)
            decoded = decode_rows(batch, transform, where) if whole is None else whole[start : start + size]
            parts.append(require_finite(self.encoder.encode_pixels(decoded), batch, self.config.dtype, where))
        return np.concatenate(parts) if parts else np.empty((0, self.encoder.dim), np.float32)


class DecodeFile:
    """What a CPU task does for the GPU actors: a file's row groups with their ``pixels``, one after the other."""

    def __init__(self, transform: TransformConfig, work: str, where: Mapping[str, list[str]]) -> None:
        self.transform, self.work, self.where = transform, work, where

    def groups(self, task: Task) -> Iterator[Task]:
        """A task a row group; one that is embedded already comes without pixels in it."""
        done = set(storage.list_files(group_folder(self.work, task["number"])))
        columns = list(dict.fromkeys(["image_id", "image", *self.where]))
        for group in range(len(row_group_sizes(task["uri"]))):
            pixels = b""
            if f"{group:05d}.parquet" not in done:
                table = select_rows(read_group(task["uri"], group, columns), self.where)
                pixels = decode_rows(table, self.transform, f"row group {group} of {task['uri']}").tobytes()
            yield {**task, "row_group": group, "pixels": pixels}


def part_name(number: int) -> str:
    """The part that file ``number`` of the corpus becomes."""
    return f"part-{number:05d}.parquet"


def group_folder(work: str, number: int) -> str:
    """Where the row groups of a file wait until all are there."""
    return storage.join(work, f"{number:05d}")


def join_groups(target: str, work: str, number: int, names: Sequence[str]) -> None:
    """Write the part ``target`` from the row groups ``names`` of file ``number``, one in memory at a time."""
    tables = (read_group(storage.join(group_folder(work, number), name), 0) for name in sorted(names))
    first = next(tables)
    with storage.open_atomic(target) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def row_group_sizes(uri: str) -> list[int]:
    """Rows of each row group of a parquet file; a damaged file raises ``ArtifactError``."""
    with _damage_named(uri):
        return [unit.num_rows for unit in list_units([uri])]


def read_group(uri: str, group: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of a row group; one that cannot be read raises ``ArtifactError``."""
    with _damage_named(f"row group {group} of {uri}"):
        return read_unit(Unit(uri, group, 0), columns)


@contextmanager
def _damage_named(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{what} cannot be read ({told}); restore the file from a copy, or run again if its store "
                            "was out of reach: what is finished is kept") from None  # fmt: skip


def decode_rows(table: pa.Table, transform: TransformConfig, where: str) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [n, 3, size, size] of corpus rows.

    The corpus decoded every image once; one that cannot be decoded now is damage, and raises ``ArtifactError`` with its
    id and ``where``, the name of its row group.
    """
    pixels = np.empty((table.num_rows, 3, transform.size, transform.size), np.uint8)
    for i, (image_id, image) in enumerate(zip(table["image_id"], table["image"], strict=True)):
        try:
            pixels[i] = read_pixels([image.as_py() or b""], transform)[0]
        except ImageError as error:
            raise ArtifactError(f"image {image_id.as_py()!r} in {where}: {error}. The corpus accepted it, so the file "
                                "was damaged since; restore it, or make the corpus again") from None  # fmt: skip
    return pixels


def unpack_pixels(pixels: bytes, transform: TransformConfig) -> npt.NDArray[np.uint8]:
    """The array uint8 [n, 3, size, size] whose bytes a decoder sent; writable."""
    return np.frombuffer(bytearray(pixels), np.uint8).reshape(-1, 3, transform.size, transform.size)


def require_finite(
    vectors: npt.NDArray[np.float32], table: pa.Table, dtype: str, where: str
) -> npt.NDArray[np.float32]:
    """``vectors`` [n, dim] as they are; one that is not finite in ``dtype`` raises ``UsageError`` with the image id."""
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(vectors.astype(dtype)).all(axis=1))
    if len(bad):
        raise UsageError(f"the vector of image {table['image_id'][int(bad[0])].as_py()!r} in {where} is not finite in "
                         f"{dtype}; set dtype=float32 and precision=float32, or take another checkpoint")  # fmt: skip
    return vectors


def require_where(columns: Sequence[str], where: Mapping[str, list[str]]) -> None:
    """Raise ``UsageError`` for a condition on a column that is not there."""
    for column in where:
        if column not in columns:
            raise UsageError(f"where names column {column!r}{nearest(column, list(columns))}; there are "
                             f"{', '.join(columns)}")  # fmt: skip


def select_rows(table: pa.Table, where: Mapping[str, list[str]]) -> pa.Table:
    """Rows whose columns have one of the given values."""
    require_where(table.column_names, where)
    for column, values in where.items():
        table = table.filter(pc.is_in(table[column], pa.array(values, table[column].type)))
    return table


def embedding_table(table: pa.Table, vectors: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> pa.Table:
    """Corpus rows [n] and vectors float32 [n, dim] as a table of ``schemas.embeddings``."""
    dim = vectors.shape[1]
    schema = schemas.embeddings(dim, float16=dtype == "float16")
    flat = pa.array(np.ascontiguousarray(vectors.astype(dtype)).reshape(-1))
    columns = {"image_id": table["image_id"], "vector": pa.FixedSizeListArray.from_arrays(flat, dim),
               **{name: table[name] for name in CARRIED}}  # fmt: skip
    return pa.table(columns).cast(schema)


def write_part(uri: str, table: pa.Table) -> None:
    """Write a parquet file that is either whole or absent."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(uri, sink.getvalue().to_pybytes())


def embed(run: StageRun[EmbedConfig]) -> None:
    """Embed every file that has no part yet, then describe the whole."""
    corpus, encoder = run.one("corpus"), run.one("encoder")
    require_where(schemas.CORPUS.names, run.config.where)
    there = set(storage.list_files(run.out.uri))
    rows = {corpus.path(entry.path): entry.rows or 0 for entry in corpus.manifest.files}
    pending = [{"uri": uri, "number": number} for number, uri in enumerate(corpus.files("part-", ".parquet"))
               if part_name(number) not in there]  # fmt: skip
    if pending:
        total = sum(rows[str(task["uri"])] for task in pending)
        with progress_bar(f"embed {run.out.name}", total, unit="image") as bar:
            for count in run_tasks(pending, encoder, run.out, run.config):
                bar.update(count)
    _describe(run, encoder)


def run_tasks(tasks: Sequence[Task], encoder: Artifact, out: Draft, config: EmbedConfig) -> Iterator[int]:
    """Write the parts of ``tasks``; yields how many images are done each time some are.

    A worker that dies has its task done again by another. An error of ours in a worker is raised as it was there.
    """
    import ray
    from ray.exceptions import RayTaskError

    dataset: Any = ray.data.from_items(list(tasks), override_num_blocks=min(len(tasks), MAX_BLOCKS))
    actors = min(config.num_actors, len(tasks))
    if config.decoders or (config.decoders is None and config.gpus_per_actor):
        actors = config.num_actors  # row groups of one file keep several busy
        decode = DecodeFile(read_config(encoder).transform, out.work("groups"), config.where)

        def decoded(task: Task) -> Iterator[Task]:
            return decode.groups(task)

        dataset = dataset.flat_map(decoded, num_cpus=1, concurrency=config.decoders)
    dataset = dataset.map(
        EmbedFile,
        fn_constructor_args=(encoder.uri, out.uri, out.work("groups"), config),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor or None,
    )  # fmt: skip
    try:
        for row in dataset.iter_rows():
            yield int(row["rows"])
    except RayTaskError as error:
        if isinstance(error.cause, LookalikeError):
            raise error.cause from None  # without the worker's traceback in its message
        raise


def _describe(run: StageRun[EmbedConfig], encoder: Artifact) -> None:
    facts = read_config(encoder)
    parts = [name for name in storage.list_files(run.out.uri) if name.startswith("part-")]
    rows = 0
    for name in parts:
        filesystem, path = storage.arrow_filesystem(run.out.path(name))
        rows += pq.read_metadata(path, filesystem=filesystem).num_rows
    if rows == 0:
        raise UsageError(f"no row of the corpus matches where={run.config.where}; nothing to embed")
    run.out.write_json("meta.json", {
        "dim": facts.dim, "dims": list(facts.dims), "rows": rows,
        "encoder": {"fingerprint": encoder.manifest.fingerprint, "name": encoder.manifest.name},
    })  # fmt: skip
    run.out.stats.update(rows=rows, dim=facts.dim, parts=len(parts))


STAGE = Stage(name="embed", kind="embeddings", config=EmbedConfig, run=embed, resumable=True,
              inputs={"corpus": Input("corpus"), "encoder": Input("encoder")})  # fmt: skip
