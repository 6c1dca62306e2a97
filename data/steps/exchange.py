"""The shuffle of the steps: rows go to the file of their key, each key's rows through one function."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike import storage
from lookalike.data.parts import Item, blocks_of, broadcast, num_partitions, part_name, read_table, write_table
from lookalike.data.steps.job import LabelJob
from lookalike.progress import track
from lookalike.sampling import mix_keys

LOCAL_ROWS = 100_000  # up to here one task does it all: a shuffle's start costs more than the work
ROWS_PER_PARTITION = 500_000  # rows that a task of a shuffle holds, 660 bytes at the most each
_WRITTEN = pa.schema([("key", pa.int64()), ("rows", pa.int64())])

Reduce = Callable[[int, pa.Table], pa.Table]


def exchange(
    job: LabelJob, items: Sequence[Item], task: Callable[[Item], pa.Table], reduce: Reduce, *, kind: str, rows: int
) -> None:
    """Write ``reduce(key, rows of that key)`` to ``part-<key>`` of the work folder ``kind``, for every key.

    ``task`` gives tables of one schema with the column ``key`` (int64); about ``rows`` rows in all. Rows come to
    ``reduce`` in no order. Keys whose file stands are left out before the shuffle, so a killed run redoes the others.
    """
    folder = job.out.work(kind)
    skip = broadcast(pa.array(finished(folder), pa.int64()))

    def route(item: Item) -> pa.Table:
        table = task(item)
        return table.filter(pc.invert(pc.is_in(table["key"], value_set=skip())))

    def finish(group: pa.Table) -> pa.Table:
        key = group["key"][0].as_py()
        result = reduce(key, group.drop_columns(["key"]))
        write_table(storage.join(folder, part_name(key)), result)
        return pa.table([[key], [result.num_rows]], schema=_WRITTEN)

    if rows <= LOCAL_ROWS:

        def whole(_: Item) -> pa.Table:
            groups = split_by_key(pa.concat_tables([route(item) for item in items])) if items else ()
            return pa.concat_tables([_WRITTEN.empty_table(), *(finish(group) for group in groups)])

        written = job.map([{"number": 0}], whole)
    else:
        partitions = max(num_partitions(items), -(-rows // ROWS_PER_PARTITION))
        grouped = job.map(list(items), route).groupby("key", num_partitions=partitions)
        written = grouped.map_groups(finish, batch_format="pyarrow", concurrency=job.config.concurrency)
    for _ in track(blocks_of(written), f"labels {kind}", unit="block"):
        pass


def split_by_key(table: pa.Table) -> Iterator[pa.Table]:
    """The rows of each key, keys ascending."""
    table = table.sort_by("key")
    keys = table["key"].to_numpy()
    starts = np.append(np.nonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])[0], len(keys))
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield table.slice(start, stop - start)


def finished(folder: str) -> list[int]:
    """Numbers of the parts in a folder."""
    names = storage.list_files(folder) if storage.exists(folder) else []
    return [int(name.removeprefix("part-").removesuffix(".parquet")) for name in names]


def work_items(job: LabelJob, kind: str) -> list[Item]:
    """An item for each part of a kind in the work folder, with the part's own number."""
    folder = job.out.work(kind)
    return [{"number": number, "uri": storage.join(folder, part_name(number))} for number in sorted(finished(folder))]


def read_part(folder: str, number: int, schema: pa.Schema) -> pa.Table:
    """A part of a work folder; none of it where nothing was written."""
    uri = storage.join(folder, part_name(number))
    return read_table(uri) if storage.exists(uri) else schema.empty_table()


def with_key(table: pa.Table, key: NDArray[np.integer]) -> pa.Table:
    """``table`` with its rows' keys."""
    return table.append_column("key", pa.array(np.asarray(key, np.int64), pa.int64()))


def num_buckets(rows: int) -> int:
    """Buckets that a hash spreads ``rows`` rows over."""
    return max(1, -(-rows // ROWS_PER_PARTITION))


def bucket_rows(rows: NDArray[np.integer], buckets: int) -> NDArray[np.int64]:
    """A bucket for each row number, by hash."""
    return (mix_keys(np.asarray(rows).astype(np.uint64), 0, "rows") % np.uint64(buckets)).astype(np.int64)


def as_frame(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a polars frame."""
    return pl.DataFrame(pl.from_arrow(table))


def total(job: LabelJob, items: Sequence[Item], task: Callable[[Item], Iterable[int]]) -> list[int]:
    """Element-wise sum, modulo 2^64, of the whole numbers that ``task`` gives for each item."""

    def each(item: Item) -> pa.Table:
        return pa.table({"n": pa.array([[int(value) for value in task(item)]], pa.list_(pa.uint64()))})

    sums: list[int] = []
    for block in blocks_of(job.map(list(items), each)) if items else ():
        for values in block["n"].to_pylist():
            sums = [(a + b) % 2**64 for a, b in zip(sums or [0] * len(values), values, strict=True)]
    return sums
