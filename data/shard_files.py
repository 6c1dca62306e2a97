"""Files of training shards: rows in the order of their keys, classes kept together in row groups."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lookalike import storage
from lookalike.data import attributes
from lookalike.schemas import SHARD

WRITTEN = pa.schema(
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("epoch", pa.float64()),
        ("label_epoch", pa.list_(pa.float64())),
        ("attributes", pa.list_(pa.int64())),
    ]
)
"""One row per file: its rows, expected copies per epoch of all images and of those of each label, known attributes."""


def write_shard(rows: pa.Table, out: str, rows_per_group: int, num_labels: int) -> pa.Table:
    """Write the rows of one ``place`` in the order of their keys; return ``WRITTEN``."""
    name = rows["place"][0].as_py()
    shard = rows.sort_by([("bundle", "ascending"), ("key", "ascending"), ("image_id", "ascending")])
    table = shard.select(SHARD.names).cast(SHARD)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SHARD, compression="none") as writer:
        for start, stop in pack_groups(shard["bundle"].to_numpy(), rows_per_group):
            writer.write_table(table.slice(start, stop - start))
    storage.write_atomic(storage.join(out, name), sink.getvalue().to_pybytes())
    repeat = shard["repeat"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
    label_epoch = copies_of_labels(shard["labels"], repeat, num_labels).tolist()
    known = attributes.count_known(shard["attributes"]).tolist()
    return pa.table([[name], [shard.num_rows], [float(repeat.sum())], [label_epoch], [known]], schema=WRITTEN)


def pack_groups(bundles: NDArray[np.uint64], rows_per_group: int) -> list[tuple[int, int]]:
    """Row groups [start, stop) of at most ``rows_per_group`` rows, of rows sorted by ``bundles`` [n].

    Only a bundle larger than a row group is cut; a row group is closed when the next bundle does not fit.
    """
    starts = np.flatnonzero(np.diff(bundles)) + 1
    groups: list[tuple[int, int]] = []
    first = 0
    for start, stop in pairwise([0, *starts.tolist(), len(bundles)]):
        if stop - first > rows_per_group and start > first:
            groups.append((first, start))
            first = start
        while stop - first > rows_per_group:
            groups.append((first, first + rows_per_group))
            first += rows_per_group
    return [*groups, (first, len(bundles))] if first < len(bundles) else groups


def copies_of_labels(labels: pa.ChunkedArray, repeat: NDArray[np.floating], num_labels: int) -> NDArray[np.float64]:
    """Expected copies per epoch of the images of each label [num_labels]: the sum of r(I) over its images."""
    lists = labels.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(np.bincount(flat, weights=np.repeat(repeat, lengths), minlength=num_labels), np.float64)
