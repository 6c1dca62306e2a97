"""``lookalike embed``: a corpus through an encoder, on an actor pool of Ray Data.

The unit of work is a row group of the corpus; each becomes one part file, written atomically, so a run that was killed
continues with the units that are missing. Pixels and vectors never cross the object store.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.config import runtime
from lookalike.errors import UsageError
from lookalike.progress import track
from lookalike.registry import nearest
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.train.loader import Unit, list_units, read_unit
from lookalike.vision.encoder import Encoder, read_config

CARRIED = ("group", "view", "split", "dataset", "category", "title")


class EmbedConfig(StageConfig):
    """Which rows to embed, how to store the vectors, how many actors work."""

    where: dict[str, list[str]] = {}
    """Keep only rows whose column has one of these values, for example ``{"dataset": ["furniture"]}``."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the vectors."""
    num_actors: int = runtime(2, ge=1)
    """Encoder replicas."""
    cpus_per_actor: int = runtime(1, ge=1)
    """CPUs and torch threads of each."""
    gpus_per_actor: float = runtime(0.0, ge=0.0)
    """GPUs of each."""
    batch_size: int = Field(32, ge=1, json_schema_extra={"runtime": True})
    """Images a forward pass."""


class EmbedUnit:
    """Actor: embeds one unit of the corpus and writes its part file."""

    def __init__(self, encoder_uri: str, folder: str, config: EmbedConfig) -> None:
        import torch

        torch.set_num_threads(config.cpus_per_actor)
        self.encoder, self.folder, self.config = Encoder.load(encoder_uri), folder, config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` names a unit and its part; returns the number of rows written."""
        table = select_rows(read_unit(Unit(row["uri"], int(row["row_group"]), 0)), self.config.where)
        vectors = self.encoder.encode(table["image"].to_pylist(), batch_size=self.config.batch_size)
        write_part(storage.join(self.folder, row["part"]), embedding_table(table, vectors, self.config.dtype))
        return {"rows": table.num_rows}


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
    """Embed every unit that has no part yet, then describe the whole."""
    corpus, encoder = run.one("corpus"), run.one("encoder")
    require_where(schemas.CORPUS.names, run.config.where)
    units = list_units(corpus.files("part-", ".parquet"))
    tasks = [{"uri": unit.uri, "row_group": unit.row_group, "part": f"part-{i:05d}.parquet"}
             for i, unit in enumerate(units)]  # fmt: skip
    pending = [task for task in tasks if not storage.exists(run.out.path(str(task["part"])))]
    if pending:
        _embed_pending(run, encoder, pending)
    _describe(run, encoder)


def _embed_pending(run: StageRun[EmbedConfig], encoder: Artifact, pending: list[dict[str, Any]]) -> None:
    config = run.config
    dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).map(
        EmbedUnit,  # type: ignore[arg-type]  # a class is made an actor
        fn_constructor_args=(encoder.uri, run.out.uri, config),
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(pending))),
        num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor or None,
    )  # fmt: skip
    for _ in track(dataset.iter_rows(), f"embed {run.out.name}", len(pending), unit="part"):
        pass


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
