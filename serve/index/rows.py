"""The rows of an embeddings artifact, as the index stages read them.

A row belongs to the shard that the hash of its id names; within a shard, rows are sorted by id. So nothing here depends
on the order of the embeddings or on how they are cut into parts.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.index_meta import shard_of
from lookalike.retrieval.ranking import Floats, Mask, Rows

COLUMNS = tuple(name for name in schemas.embeddings(1).names if name != "vector")
READ_BYTES = 4 << 20
"""Bytes read from a column at a time, because a row group may exceed the memory."""
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class EmbeddingRows:
    """The rows of an embeddings artifact that match ``where``. Plain values, so that Ray tasks can take them."""

    parts: list[str]
    sha256: list[str]
    """SHA-256 of each part's file."""
    dim: int
    where: dict[str, list[str]]

    def table(self, part: str) -> tuple[pa.Table, Rows]:
        """Return id and metadata of one part's matching rows, and their places in the part."""
        file = _open_parquet(part)
        schemas.require_columns(file.schema_arrow.empty_table(), schemas.embeddings(self.dim), part)
        table = file.read(columns=list(COLUMNS))
        keep = np.ones(len(table), bool)
        for column, values in self.where.items():
            keep &= pc.is_in(table[column], pa.array(values, pa.string())).to_numpy(zero_copy_only=False).astype(bool)
        places = np.flatnonzero(keep)
        return table.take(pa.array(places)), places

    def vectors(self, part: str, places: Rows, batch_rows: int) -> Iterator[tuple[slice, Floats]]:
        """Yield (slice of ``places``, raw vectors float32 [m, dim]) for rising ``places`` in one part.

        Row groups without a place are not read.
        """
        if not len(places):
            return
        file = _open_parquet(part)
        column = file.schema_arrow.field("vector").type
        if not pa.types.is_fixed_size_list(column) or column.list_size != self.dim:
            raise ArtifactError(f"{part} holds {column} where vectors of {self.dim} numbers are expected")
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for group in np.unique(np.searchsorted(starts, places, side="right") - 1).tolist():
            first = int(starts[group])
            for batch in file.iter_batches(batch_size=batch_rows, columns=["vector"], row_groups=[group]):
                chosen = slice(*np.searchsorted(places, [first, first + len(batch)]))
                if chosen.stop > chosen.start:
                    taken = batch.column(0).take(pa.array(places[chosen] - first))
                    numbers = taken.flatten().to_numpy(zero_copy_only=False)
                    yield chosen, numbers.astype(np.float32).reshape(-1, self.dim)
                first += len(batch)


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(uri)
    return pq.ParquetFile(path, filesystem=filesystem, buffer_size=READ_BYTES)


def count_rows(source: EmbeddingRows, part: str, num_shards: int) -> list[int]:
    """Return the number of one part's rows for each shard."""
    table, _ = source.table(part)
    return [int(count) for count in np.bincount(_shards_of(table, num_shards), minlength=num_shards)]


def _shards_of(table: pa.Table, num_shards: int) -> Rows:
    return np.array([shard_of(image_id, num_shards) for image_id in table["image_id"].to_pylist()], dtype=np.int64)


class ShardRows(NamedTuple):
    """The rows of one shard, and where their vectors are."""

    table: pa.Table
    """Id and metadata of each row, sorted by id."""
    places: list[Rows]
    """Per part, the rising places of the shard's vectors in it."""
    rows: list[Rows]
    """Per part, the row number in ``table`` for each of its ``places``."""

    def only(self, mask: Mask) -> "ShardRows":
        """Return the rows in ``mask``, bool [n], renumbered."""
        numbers = np.cumsum(mask) - 1
        masks = [mask[rows] for rows in self.rows]
        return ShardRows(
            self.table.filter(pa.array(mask)),
            [places[part] for places, part in zip(self.places, masks, strict=True)],
            [numbers[rows[part]] for rows, part in zip(self.rows, masks, strict=True)],
        )


def collect_rows(source: EmbeddingRows, shard: int, num_shards: int) -> ShardRows:
    """Return the rows of one shard; ``ArtifactError`` names an id that occurs twice."""
    tables, places = [], []
    for part in source.parts:
        table, part_places = source.table(part)
        mine = np.flatnonzero(_shards_of(table, num_shards) == shard)
        tables.append(table.take(pa.array(mine)))
        places.append(part_places[mine])
    table = pa.concat_tables(tables)
    order = pc.sort_indices(table["image_id"]).to_numpy()
    table = table.take(pa.array(order)).combine_chunks()
    ids = table["image_id"]
    twice = pc.index(pc.equal(ids[:-1], ids[1:]), True).as_py()
    if twice >= 0:
        raise ArtifactError(
            f"image_id {ids[twice].as_py()!r} occurs twice in the embeddings, where ids must be unique;"
            " make the corpus and the embeddings again"
        )
    rows = np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order))
    borders = np.cumsum([len(part_places) for part_places in places])[:-1]
    return ShardRows(table, places, np.split(rows, borders))


def read_vectors(source: EmbeddingRows, shard_rows: ShardRows, batch_rows: int) -> Iterator[tuple[Rows, Floats]]:
    """Yield (rows [m], raw vectors float32 [m, dim]) until each row of the shard occurred once, part by part.

    Raises ``ArtifactError`` naming the first row with a number that is not finite.
    """
    for part, places, rows in zip(source.parts, shard_rows.places, shard_rows.rows, strict=True):
        for chosen, vectors in source.vectors(part, places, batch_rows):
            finite = np.isfinite(vectors).all(axis=1)
            if not finite.all():
                bad = shard_rows.table["image_id"][int(rows[chosen][~finite][0])].as_py()
                raise ArtifactError(f"the vector of {bad!r} in {part} holds NaN or infinity; embed again")
            yield rows[chosen], vectors


def digest_rows(table: pa.Table, vectors: Floats) -> Digests:
    """Return a digest of each row, uint64 [m]: 64 bits of BLAKE2b over its columns and raw vector, float32 [m, dim].

    Two versions of a row have the same digest with a probability of 2^-64.
    """
    columns = [column.cast(pa.string()) for column in table.columns]
    sizes = [pc.binary_length(column).cast(pa.string()) for column in columns]  # null where the value is
    texts = pc.binary_join_element_wise(*sizes, *columns, "|", null_handling="replace", null_replacement="")
    digests = np.empty(len(table), "<u8")
    for row, (text, vector) in enumerate(zip(texts.to_pylist(), vectors.astype("<f4", order="C"), strict=True)):
        digest = hashlib.blake2b(text.encode(), digest_size=8)
        digest.update(vector)
        digests[row] = int.from_bytes(digest.digest(), "little")
    return digests


def read_source(embeddings: Artifact, where: dict[str, list[str]]) -> EmbeddingRows:
    """Return the rows of an embeddings artifact that match ``where``; ``UsageError`` for a column it does not have."""
    if unknown := [column for column in where if column not in COLUMNS]:
        raise UsageError(f"where names columns {unknown}; embeddings carry {', '.join(COLUMNS)}")
    parts = embeddings.files("part-", ".parquet")
    if not parts:
        raise ArtifactError(f"{embeddings.uri} holds no part-*.parquet; run embed again")
    sha256 = {embeddings.path(file.path): file.sha256 for file in embeddings.manifest.files}
    dim = int(embeddings.read_json("meta.json")["dim"])
    return EmbeddingRows(parts, [sha256[part] for part in parts], dim, where)
