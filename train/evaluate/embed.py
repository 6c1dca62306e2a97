"""``lookalike embed``: a corpus through an encoder, on an actor pool of Ray Data.

A file of the corpus becomes a part file. Its row groups are embedded one after the other and kept, so a run that was
killed continues with the row group it was at. On CPUs an actor decodes its own images, and neither pixels nor vectors
cross the object store. GPU actors are fed by CPU tasks on any node with CPUs: the pixels of a row group travel as
bytes, as many at a time as Ray Data's share of the object store holds. The driver handles files of some thousand images
each, never single images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
from lookalike.outlook import Outlook, require_values
from lookalike.progress import follow_remote
from lookalike.registry import nearest
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.train.evaluate.embed_files import (
    decode_rows,
    embedding_table,
    group_folder,
    join_groups,
    part_name,
    read_group,
    require_finite,
    row_group_sizes,
    write_part,
)
from lookalike.vision.encoder import Encoder, Precision, read_config
from lookalike.vision.transforms import TransformConfig

log = get_logger(__name__)
MAX_BLOCKS = 4096  # the driver keeps a reference per block; more files than this share blocks
DECODER_MEMORY = 512 << 20  # bytes that Ray reserves for a decoding task: images and pixels of a row group
Task = dict[str, Any]
"""A file of the corpus: ``uri``, ``number``; ``row_group`` and ``pixels`` if a decoder made them, else None."""


class EmbedConfig(StageConfig):
    """Rows to embed, format of the vectors, actors."""

    where: dict[str, list[str]] = {}
    """Keep only rows whose column has one of these values, for example ``{"dataset": ["furniture"]}``."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the vectors."""
    precision: Precision = "float32"
    """Precision of the encoder's matrix products; ``bfloat16`` also works on CPUs, ``float16`` only on GPUs."""
    num_actors: int = runtime(2, ge=1)
    """Encoder replicas."""
    cpus_per_actor: int = runtime(1, ge=1)
    """CPUs and torch threads of each actor."""
    gpus_per_actor: float = runtime(0.0, ge=0.0)
    """GPUs of each actor; above 0, CPU tasks decode the images."""
    decoders: int | None = runtime(None, ge=0)
    """CPU tasks that decode at a time; 0: the actors decode. None: 0 for CPU actors, all free CPUs for GPU actors."""
    batch_size: int = Field(32, ge=1, json_schema_extra={"runtime": True})
    """Images per forward pass."""


class EmbedFile:
    """Actor: embeds files of the corpus and writes their parts; it skips row groups that are done."""

    def __init__(self, encoder_uri: str, folder: str, work: str, config: EmbedConfig, progress: Any = None) -> None:
        import torch

        torch.set_num_threads(config.cpus_per_actor)
        self._progress = progress
        self.encoder = Encoder.load(encoder_uri, precision=config.precision)
        self.folder, self.work, self.config = folder, work, config

    def __call__(self, task: Task) -> dict[str, Any]:
        """Embed a whole file or one row group; returns the message and code of a ``LookalikeError``, if any."""
        try:
            self.embed(task)
        except LookalikeError as error:  # a value, because Ray Data wraps raised errors
            return {"error": str(error), "code": error.exit_code}
        return {"error": "", "code": 0}

    def embed(self, task: Task) -> None:
        """Write the task's row groups, and the part if the file's last row group is done."""
        sizes = row_group_sizes(task["uri"])
        groups = range(len(sizes)) if task["row_group"] is None else [task["row_group"]]
        for group in groups:
            self._embed(task, group)
            if self._progress is not None:
                self._progress.add.remote(sizes[group])
        done = storage.list_files(group_folder(self.work, task["number"]))
        if len(done) == len(sizes):  # two actors at once write the same bytes
            join_groups(storage.join(self.folder, part_name(task["number"])), self.work, task["number"], done)

    def _embed(self, task: Task, group: int) -> None:
        target = storage.join(group_folder(self.work, task["number"]), f"{group:05d}.parquet")
        if storage.exists(target):
            return
        pixels = task["pixels"]
        columns = None if pixels is None else list(dict.fromkeys(["image_id", *schemas.CARRIED, *self.config.where]))
        table = select_rows(read_group(task["uri"], group, columns), self.config.where)
        vectors = self._vectors(table, f"row group {group} of {task['uri']}", pixels)
        write_part(target, embedding_table(table, vectors, self.config.dtype))

    def _vectors(self, table: pa.Table, where: str, pixels: bytes | None) -> npt.NDArray[np.float32]:
        size, transform, parts = self.config.batch_size, self.encoder.config.transform, []
        shape = -1, 3, transform.size, transform.size
        whole = None if pixels is None else np.frombuffer(bytearray(pixels), np.uint8).reshape(shape)  # writable
        for start in range(0, table.num_rows, size):
            batch = table.slice(start, size)
            decoded = decode_rows(batch, transform, where) if whole is None else whole[start : start + size]
            parts.append(require_finite(self.encoder.encode_pixels(decoded), batch, self.config.dtype, where))
        return np.concatenate(parts) if parts else np.empty((0, self.encoder.dim), np.float32)


class DecodeFile:
    """CPU task for the GPU actors: decodes a file's row groups into ``pixels``, one after the other."""

    def __init__(self, transform: TransformConfig, work: str, where: Mapping[str, list[str]]) -> None:
        self.transform, self.work, self.where = transform, work, where

    def groups(self, task: Task) -> Iterator[Task]:
        """One task per row group; without pixels if it is embedded already, or damaged (the actor then says why)."""
        done = set(storage.list_files(group_folder(self.work, task["number"])))
        try:
            names = [f"{group:05d}.parquet" for group in range(len(row_group_sizes(task["uri"])))]
        except ArtifactError:
            names = []
            yield task
        for group, name in enumerate(names):
            yield {**task, "row_group": group, "pixels": None if name in done else self._pixels(task["uri"], group)}

    def _pixels(self, uri: str, group: int) -> bytes | None:
        columns = list(dict.fromkeys(["image_id", "image", *self.where]))
        with suppress(ArtifactError):
            table = select_rows(read_group(uri, group, columns), self.where)
            return decode_rows(table, self.transform, f"row group {group} of {uri}").tobytes()
        return None


def require_where(columns: Sequence[str], where: Mapping[str, list[str]]) -> None:
    """Raise ``UsageError`` for a condition on a missing column."""
    for column in where:
        if column not in columns:
            raise UsageError(
                f"where names column {column!r}{nearest(column, list(columns))}; there are {', '.join(columns)}"
            )


def select_rows(table: pa.Table, where: Mapping[str, list[str]]) -> pa.Table:
    """Rows whose columns have one of the given values."""
    require_where(table.column_names, where)
    for column, values in where.items():
        table = table.filter(pc.is_in(table[column], pa.array(values, table[column].type)))
    return table


def embed(run: StageRun[EmbedConfig]) -> None:
    """Embed every file without a part, then write ``meta.json`` and statistics."""
    corpus, encoder = run.one("corpus"), run.one("encoder")
    require_where(schemas.CORPUS.names, run.config.where)
    parts = set(storage.list_files(run.out.uri))
    rows = {corpus.path(entry.path): entry.rows or 0 for entry in corpus.manifest.files}
    pending = [
        {"uri": uri, "number": number, "row_group": None, "pixels": None}
        for number, uri in enumerate(corpus.files("part-", ".parquet"))
        if part_name(number) not in parts
    ]
    if pending:
        total = sum(rows[str(task["uri"])] for task in pending)
        with follow_remote(f"embed {run.out.name}", total, unit="image") as progress:
            run_tasks(pending, encoder, run.out, run.config, progress)
    _describe(run, encoder)


def run_tasks(tasks: Sequence[Task], encoder: Artifact, out: Draft, config: EmbedConfig, progress: Any = None) -> None:
    """Write the parts of ``tasks``; the actor ``progress`` counts the rows that are done.

    If a worker dies, another does its task again. The first ``LookalikeError`` of a worker is raised here.
    """
    import ray

    dataset: Any = ray.data.from_items(list(tasks), override_num_blocks=min(len(tasks), MAX_BLOCKS))
    actors = min(config.num_actors, len(tasks))
    if config.decoders or (config.decoders is None and config.gpus_per_actor):
        actors = config.num_actors  # row groups of one file keep several busy
        _warn_without_cpus(actors * config.cpus_per_actor)
        decode = DecodeFile(read_config(encoder).transform, out.work("groups"), config.where)

        def decoded(task: Task) -> Iterator[Task]:
            return decode.groups(task)

        # its own resources keep it a separate task: Ray Data would otherwise run it within the actors
        dataset = dataset.flat_map(decoded, num_cpus=1, memory=DECODER_MEMORY, concurrency=config.decoders)
    dataset = dataset.map(
        EmbedFile,
        fn_constructor_args=(encoder.uri, out.uri, out.work("groups"), config, progress),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise _ERRORS.get(row["code"], LookalikeError)(row["error"])


_ERRORS = {error.exit_code: error for error in (UsageError, ArtifactError)}


def _warn_without_cpus(needed: int) -> None:
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    if cpus <= needed:
        log.warning(
            "decoders wait %s",
            fields(cpus=cpus, actors_take=needed, remedy="lower num_actors or cpus_per_actor, or add nodes"),
        )


def foresee(config: EmbedConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: rows that ``where`` keeps, with the columns that embeddings carry."""
    (corpus,) = given["corpus"].values()
    require_values(corpus, "where", config.where, schemas.CORPUS.names)
    return {
        column: {value: n for value, n in corpus[column].items() if value in config.where.get(column, corpus[column])}
        for column in schemas.CARRIED
        if column in corpus
    }


def _describe(run: StageRun[EmbedConfig], encoder: Artifact) -> None:
    facts = read_config(encoder)
    parts = [name for name in storage.list_files(run.out.uri) if name.startswith("part-")]
    rows = 0
    for name in parts:
        filesystem, path = storage.arrow_filesystem(run.out.path(name))
        rows += pq.read_metadata(path, filesystem=filesystem).num_rows
    if rows == 0:
        raise UsageError(f"no row of the corpus matches where={run.config.where}; nothing to embed")
    stamp = {"fingerprint": encoder.manifest.fingerprint, "name": encoder.manifest.name}
    run.out.write_json("meta.json", {"dim": facts.dim, "dims": list(facts.dims), "rows": rows, "encoder": stamp})
    run.out.stats.update(rows=rows, dim=facts.dim, parts=len(parts))


STAGE = Stage(
    name="embed",
    kind="embeddings",
    config=EmbedConfig,
    run=embed,
    resumable=True,
    foresee=foresee,
    inputs={"corpus": Input("corpus"), "encoder": Input("encoder")},
    version=3,
)
