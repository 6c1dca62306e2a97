"""Files of the embedding job: row groups of a corpus, pixels, vectors, parts; errors name the damaged file.

A file of the corpus becomes a part; its row groups wait in a folder until the last of them is done.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import schemas, storage
from lookalike.errors import ArtifactError, UsageError
from lookalike.train.feed.row_groups import RowGroup, list_row_groups, read_row_group
from lookalike.vision.encoder import read_pixels
from lookalike.vision.images import ImageError
from lookalike.vision.transforms import TransformConfig


def part_name(number: int) -> str:
    """Name of the part that file ``number`` of the corpus becomes."""
    return f"part-{number:05d}.parquet"


def group_folder(work: str, number: int) -> str:
    """Folder in which the row groups of a file wait until all are done."""
    return storage.join(work, f"{number:05d}")


def join_groups(target: str, work: str, number: int, names: Sequence[str]) -> None:
    """Write the part ``target`` from the row groups ``names`` of file ``number``, one in memory at a time."""
    tables = (read_group(storage.join(group_folder(work, number), name), 0) for name in sorted(names))
    first = next(tables)
    texts = [name for name in first.column_names if name != "vector"]  # numbers gain nothing from a dictionary
    with (
        storage.open_atomic(target) as file,
        pq.ParquetWriter(file, first.schema, compression="zstd", use_dictionary=texts) as writer,
    ):
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def row_group_sizes(uri: str) -> list[int]:
    """Rows of each row group of a parquet file; a damaged file raises ``ArtifactError``."""
    return [unit.num_rows for unit in list_row_groups([uri])]


def read_group(uri: str, group: int, columns: list[str] | None = None) -> pa.Table:
    """Rows of a row group; raises ``ArtifactError`` if it cannot be read."""
    return read_row_group(RowGroup(uri, group, 0), columns)


def decode_rows(table: pa.Table, transform: TransformConfig, where: str) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [n, 3, size, size] of corpus rows.

    The corpus stage decoded every image once, so an image that cannot be decoded now is damaged: it raises
    ``ArtifactError`` with its id and ``where``, the name of its row group.
    """
    pixels = np.empty((table.num_rows, 3, transform.size, transform.size), np.uint8)
    for i, (image_id, image) in enumerate(zip(table["image_id"], table["image"], strict=True)):
        try:
            pixels[i] = read_pixels([image.as_py() or b""], transform)[0]
        except ImageError as error:
            raise ArtifactError(
                f"image {image_id.as_py()!r} in {where}: {error}. The corpus accepted it, so the file "
                "was damaged later; restore it, or make the corpus again"
            ) from None
    return pixels


def require_finite(
    vectors: npt.NDArray[np.float32], table: pa.Table, dtype: str, where: str
) -> npt.NDArray[np.float32]:
    """Return ``vectors`` [n, dim]; a vector that is not finite in ``dtype`` raises ``UsageError`` with the image id."""
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(vectors.astype(dtype)).all(axis=1))
    if len(bad):
        raise UsageError(
            f"the vector of image {table['image_id'][int(bad[0])].as_py()!r} in {where} is not finite in "
            f"{dtype}; set dtype=float32 and precision=float32, or take another checkpoint"
        )
    return vectors


def embedding_table(table: pa.Table, vectors: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> pa.Table:
    """Corpus rows [n] and vectors float32 [n, dim] as a table of ``schemas.embeddings``."""
    dim = vectors.shape[1]
    schema = schemas.embeddings(dim, float16=dtype == "float16")
    flat = pa.array(np.ascontiguousarray(vectors.astype(dtype)).reshape(-1))
    columns = {
        "image_id": table["image_id"],
        "vector": pa.FixedSizeListArray.from_arrays(flat, dim),
        **{name: table[name] for name in schemas.CARRIED},
    }
    return pa.table(columns).cast(schema)


def write_part(uri: str, table: pa.Table) -> None:
    """Write a parquet file that is either whole or absent."""
    with storage.open_atomic(uri) as file:
        pq.write_table(table, file, compression="zstd")
