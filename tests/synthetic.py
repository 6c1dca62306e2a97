"""Seeded Matryoshka-like embeddings for tests, benchmarks and capacity trials.

Super-classes contain classes, classes sub-clusters, sub-clusters items; the variance of dimension i falls as
(i + 1)^-a, steeper for coarser levels, so that a prefix separates classes and later dimensions separate items.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import schemas, storage
from lookalike.artifacts import Artifact, Draft, hash_json
from lookalike.retrieval.ranking import Floats

LEVELS = ((0.26, 1.2), (0.34, 1.2), (0.12, 1.0), (0.28, 0.8))
"""Share of the variance and steepness a of super-class, class, sub-cluster and item."""
SUPER_CLASSES, SUB_CLUSTERS = 32, 16


class Hierarchy:
    """The centres that vectors are drawn around, float32 [super-classes + classes * 17, dim]."""

    def __init__(self, generator: np.random.Generator, dim: int, num_classes: int) -> None:
        self.dim, self.num_classes = dim, num_classes
        weights = 1 / np.sqrt(np.arange(1, num_classes + 1))
        self._shares = weights / weights.sum()
        self._parent = generator.integers(0, SUPER_CLASSES, num_classes)
        sizes = (SUPER_CLASSES, num_classes, num_classes * SUB_CLUSTERS)
        self._centres = [_draw(generator, size, dim, *level) for size, level in zip(sizes, LEVELS[:3], strict=True)]

    def draw(self, generator: np.random.Generator, num: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Raw vectors float32 [num, dim], of varying length, and their classes int64 [num] (Zipf 0.5)."""
        classes = generator.choice(self.num_classes, size=num, p=self._shares)
        sub_clusters = classes * SUB_CLUSTERS + generator.integers(0, SUB_CLUSTERS, num)
        vectors = _draw(generator, num, self.dim, *LEVELS[3])
        for centre, members in zip(self._centres, (self._parent[classes], classes, sub_clusters), strict=True):
            vectors += centre[members]
        vectors *= generator.uniform(0.5, 20, (num, 1)).astype(np.float32)
        return vectors, classes.astype(np.int64)


def make_vectors(num: int, dim: int, *, num_classes: int = 1000, seed: int = 0) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Raw vectors float32 [num, dim], of varying length, and their classes int64 [num] (Zipf 0.5)."""
    generator = np.random.default_rng(seed)
    return Hierarchy(generator, dim, num_classes).draw(generator, num)


def make_part(hierarchy: Hierarchy, num: int, *, part: int, seed: int = 0) -> tuple[Floats, npt.NDArray[np.int64]]:
    """One part of data larger than memory; the result depends only on ``seed`` and ``part``."""
    return hierarchy.draw(np.random.default_rng([seed, part]), num)


def _draw(generator: np.random.Generator, num: int, dim: int, share: float, steepness: float) -> Floats:
    variance = np.arange(1, dim + 1) ** -steepness
    scale = np.sqrt(share * variance / variance.sum()).astype(np.float32)
    drawn: Floats = generator.standard_normal((num, dim), dtype=np.float32)
    drawn *= scale
    return drawn


def publish_embeddings(
    root: str,
    name: str,
    vectors: Floats,
    columns: Mapping[str, Sequence[str | None]],
    *,
    dims: Sequence[int],
    num_parts: int = 2,
    encoder: str = "synthetic",
) -> Artifact:
    """Publish ``vectors`` as an ``embeddings`` artifact; ``columns``: image_id and any metadata, null if missing."""
    table = embeddings_table(vectors, columns)
    mark = hash_json([name, list(dims), vectors.shape, vectors.tobytes().hex()[:4096], sorted(columns), encoder])[:20]
    step = max(1, -(-len(vectors) // num_parts))
    tables = (table.slice(start, step) for start in range(0, len(vectors), step))
    return publish_tables(Draft(root, "embeddings", name, mark), tables, dims=dims, encoder=encoder)


def embeddings_table(vectors: Floats, columns: Mapping[str, Sequence[str | None]]) -> pa.Table:
    """A part of an ``embeddings`` artifact; ``columns``: image_id and any metadata, null if missing."""
    schema = schemas.embeddings(vectors.shape[1], float16=vectors.dtype == np.float16)
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    missing = [None] * len(vectors)
    return pa.table(
        [
            values if field.name == "vector" else pa.array(columns.get(field.name, missing), field.type)
            for field in schema
        ],
        schema=schema,
    )


def publish_tables(draft: Draft, tables: Iterable[pa.Table], *, dims: Sequence[int], encoder: str) -> Artifact:
    """Publish ``tables`` as the parts of an ``embeddings`` artifact, writing each before taking the next."""
    draft.clear()
    storage.make_directory(draft.uri)
    rows = 0
    for number, table in enumerate(tables):
        filesystem, path = storage.arrow_filesystem(draft.path(f"part-{number:05d}.parquet"))
        others = [column for column in table.column_names if column != "vector"]
        pq.write_table(table, path, filesystem=filesystem, use_dictionary=others)  # float16 reads 5x faster without
        rows += len(table)
    facts = {"fingerprint": encoder, "name": encoder, "uri": ""}
    draft.write_json("meta.json", {"dim": dims[-1], "dims": list(dims), "encoder": facts, "rows": rows})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
