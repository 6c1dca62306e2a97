"""Signatures: everything of an image that the duplicate search and the dictionary need, aligned with the corpus."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from lookalike.data.duplicates.margins import shrink, trim_margin
from lookalike.data.duplicates.pdq import HASH_BITS, hash_images
from lookalike.data.duplicates.twins import COLOURS
from lookalike.sampling import stable_keys
from lookalike.vision.images import decode

ROW_SHIFT = 32  # a row's number is its part's number, shifted, plus its index there: the corpus order
BATCH_PIXELS = 1 << 18  # hashed together
SIGNED_COLUMNS = ["image_id", "image", "group", "split", "dataset"]


def signature_schema(dim: int) -> pa.Schema:
    """One row an image of any split, in corpus order."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("content", pa.binary(16)),  # BLAKE2 of the bytes
            pa.field("pdq", pa.binary(HASH_BITS // 8)),
            pa.field("mirror", pa.binary(HASH_BITS // 8)),  # PDQ of the mirror image; null unless asked for
            pa.field("quality", pa.int32()),  # of the PDQ hash, 0 to 100
            pa.field("group", pa.string()),
            pa.field("split", pa.string()),
            pa.field("dataset", pa.string()),
            pa.field("trimmed", pa.binary(HASH_BITS // 8)),  # the same three of what lies inside the margins
            pa.field("trimmed_mirror", pa.binary(HASH_BITS // 8)),
            pa.field("trimmed_quality", pa.int32()),
            pa.field("colours", pa.binary(COLOURS)),  # its mean colours in cells, row by row
            pa.field("vector", pa.list_(pa.float16(), dim)),  # projected embedding of length 1
        ]
    )


def row_numbers(part: int, count: int) -> NDArray[np.int64]:
    """Numbers [count] of the rows of a corpus part."""
    return (np.int64(part) << ROW_SHIFT) + np.arange(count, dtype=np.int64)


def sign_images(table: pa.Table, vectors: pa.Array, part: int, mirrored: bool) -> pa.Table:
    """Signatures of a corpus part (``SIGNED_COLUMNS``) and its projected vectors, in its order."""
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


def running_spans(wanted: Sequence[int], files: Sequence[tuple[str, int]]) -> list[list[Span]]:
    """Where the rows of each of the corpus parts (sizes ``wanted``) lie when ``files`` (URI, rows) run through the
    corpus in its order. The totals must be equal.
    """
    starts = np.concatenate([[0], np.cumsum([rows for _, rows in files])]).astype(np.int64)
    spans, first = [], 0
    for count in wanted:
        last, here = first + count, []
        file = int(np.searchsorted(starts, first, side="right")) - 1
        while count and file < len(files) and starts[file] < last:
            low, high = max(first, int(starts[file])), min(last, int(starts[file + 1]))
            if low < high:
                here.append(Span(files[file][0], low - int(starts[file]), high - int(starts[file])))
            file += 1
        spans.append(here)
        first = last
    return spans


def bucket_of(ids: Sequence[str], buckets: int) -> NDArray[np.int64]:
    """A bucket [n] in 0 to ``buckets`` for each image id, by its hash."""
    return (stable_keys(ids) % np.uint64(buckets)).astype(np.int64)


def match_vectors(rows: pa.Table) -> pa.Table:
    """Corpus rows and embeddings of one bucket, joined: the ``row`` (int64) of each image with its ``vector``.

    ``rows``: image_id, row (null for an embedding), vector (null for a corpus row). A corpus row without an embedding
    keeps a null vector; of several embeddings of an image one is taken, the smallest by its bytes.
    """
    corpus = rows.filter(rows["row"].is_valid()).select(["image_id", "row"])
    vectors = rows.filter(rows["vector"].is_valid()).select(["image_id", "vector"])
    vectors = vectors.sort_by([("image_id", "ascending"), ("vector", "ascending")])
    first: dict[str, int] = {}
    for index, image_id in enumerate(vectors["image_id"].to_pylist()):
        first.setdefault(image_id, index)
    place = pa.array([first.get(image_id) for image_id in corpus["image_id"].to_pylist()], pa.int64())
    return corpus.append_column("vector", vectors["vector"].combine_chunks().take(place)).sort_by("row")
