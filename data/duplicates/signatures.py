"""Signatures: all that the duplicate search and the dictionary need of an image, in the order of the corpus."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from lookalike.data.duplicates.margins import shrink, trim_margin
from lookalike.data.duplicates.pdq import HASH_BITS, hash_images
from lookalike.data.duplicates.twins import COLOURS
from lookalike.sampling import stable_keys
from lookalike.vision.images import decode

ROW_SHIFT = 32  # row number = (part number << ROW_SHIFT) + index in the part: the order of the corpus
BATCH_PIXELS = 1 << 21  # pixels of the pictures that are hashed together: many small ones, so that sizes recur
SIGNED_COLUMNS = ["image_id", "image", "group", "split", "dataset"]


def signature_schema(dim: int) -> pa.Schema:
    """One row per image of any split, in corpus order."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("content", pa.binary(16)),  # BLAKE2 of the bytes
            pa.field("pdq", pa.binary(HASH_BITS // 8)),
            pa.field("mirror", pa.binary(HASH_BITS // 8)),  # PDQ of the mirror image; null unless mirror images count
            pa.field("quality", pa.int32()),  # of the PDQ hash, 0 to 100
            pa.field("group", pa.string()),
            pa.field("split", pa.string()),
            pa.field("dataset", pa.string()),
            pa.field("trimmed", pa.binary(HASH_BITS // 8)),  # the same three of the content inside the margins
            pa.field("trimmed_mirror", pa.binary(HASH_BITS // 8)),
            pa.field("trimmed_quality", pa.int32()),
            pa.field("colours", pa.binary(COLOURS)),  # its mean colours in cells, row by row
            pa.field("vector", pa.list_(pa.float16(), dim)),  # projected embedding of length 1
        ]
    )


def row_numbers(part: int, count: int) -> NDArray[np.int64]:
    """Numbers [count] of the first ``count`` rows of a corpus part."""
    return (np.int64(part) << ROW_SHIFT) + np.arange(count, dtype=np.int64)


def sign_images(table: pa.Table, vectors: pa.Array, part: int, mirrored: bool) -> pa.Table:
    """Signatures of a corpus part (``table`` has ``SIGNED_COLUMNS``) with its projected vectors, in its order."""
    schema = signature_schema(vectors.type.list_size)
    data = table["image"].to_pylist()
    signatures = sign_pixels(map(decode, data), mirrored)
    rows = [
        row | {"content": hashlib.blake2b(value, digest_size=16).digest()}
        for row, value in zip(signatures, data, strict=True)
    ]
    given = {"row": pa.array(row_numbers(part, table.num_rows)), "vector": vectors}
    given |= {name: table[name].combine_chunks() for name in ("image_id", "group", "split", "dataset")}
    columns = [given[f.name] if f.name in given else pa.array([row[f.name] for row in rows], f.type) for f in schema]
    return pa.table(columns, schema=schema)


def sign_pixels(images: Iterable[Image.Image], mirrored: bool) -> Iterator[dict[str, Any]]:
    """Yield for each RGB image the columns of its signature that depend on its pixels alone."""
    for batch in batches_of(images):
        contents = [trim_margin(image) for image in batch]
        whole = hash_columns([np.asarray(image) for image in batch], mirrored, ("pdq", "mirror", "quality"))
        trimmed = hash_columns(contents, mirrored, ("trimmed", "trimmed_mirror", "trimmed_quality"))
        for content, columns, trimmed_columns in zip(contents, whole, trimmed, strict=True):
            yield {"colours": shrink(content).tobytes()} | columns | trimmed_columns


def batches_of(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    """Consecutive images, about ``BATCH_PIXELS`` at a time: so many fit into a processor's cache."""
    batch, pixels = [], 0
    for image in images:
        batch.append(image)
        pixels += image.width * image.height
        if pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def hash_columns(
    images: list[NDArray[np.uint8]], mirrored: bool, names: tuple[str, str, str]
) -> Iterator[dict[str, Any]]:
    """Yield for each RGB image [h, w, 3] its PDQ hash, the hash of its mirror image (or None) and its quality."""
    turned = [pixels[:, ::-1] for pixels in images] if mirrored else []
    bits, quality = hash_images([*images, *turned])
    hashes: list[bytes | None] = [row.tobytes() for row in bits]
    mirrors = hashes[len(images) :] or [None] * len(images)
    for values in zip(hashes[: len(images)], mirrors, quality[: len(images)].tolist(), strict=True):
        yield dict(zip(names, values, strict=True))


class Span(NamedTuple):
    """Consecutive rows of a file."""

    uri: str
    start: int
    stop: int


def running_spans(sizes: Sequence[int], files: Sequence[tuple[str, int]]) -> list[list[Span]]:
    """Where the rows of each corpus part lie in ``files`` (URI, rows) that hold the corpus in its order.

    ``sizes``: rows of each corpus part; the totals must be equal.
    """
    part_starts, file_starts = np.cumsum([0, *sizes]), np.cumsum([0, *(rows for _, rows in files)])
    spans: list[list[Span]] = [[] for _ in sizes]
    for start, stop in pairwise(np.union1d(part_starts, file_starts).tolist()):
        part, file = (int(np.searchsorted(starts, start, side="right")) - 1 for starts in (part_starts, file_starts))
        offset = int(file_starts[file])
        spans[part].append(Span(files[file][0], start - offset, stop - offset))
    return spans


def bucket_of(ids: list[str], buckets: int) -> NDArray[np.int64]:
    """Bucket [n], below ``buckets``, of each image id, by its hash."""
    return (stable_keys(ids) % np.uint64(buckets)).astype(np.int64)


def match_vectors(rows: pa.Table) -> pa.Table:
    """Join the corpus rows and the embeddings of one bucket: image_id, row, vector of each corpus row, by row.

    ``rows``: image_id, row (null for an embedding), vector (null for a corpus row). The vector of a corpus row without
    an embedding stays null; of several embeddings of an image the one with the smallest bytes is taken.
    """
    frame = pl.DataFrame(rows)
    first = frame.drop_nulls("vector").group_by("image_id").agg(pl.col("vector").min())
    joined = frame.drop_nulls("row").select("image_id", "row").join(first, on="image_id", how="left")
    return joined.sort("row").to_arrow().cast(rows.schema)
