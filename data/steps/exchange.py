"""The shuffle of the steps: every row goes to the file of its key, and one function sees all rows of a key."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike import storage
from lookalike.data.duplicates.signatures import ROW_SHIFT
from lookalike.data.parts import Item, blocks_of, broadcast, num_partitions, part_name, read_table, write_table
from lookalike.data.steps.job import LabelJob
from lookalike.progress import track
from lookalike.sampling import mix_keys

LOCAL_ROWS = 100_000  # up to here one task does it all: starting a shuffle costs more than the work
ROWS_PER_PARTITION = 500_000  # rows that a task of a shuffle holds, at most 660 bytes each
ONE_TASK: list[Item] = [{"number": 0}]
_WRITTEN = pa.schema([("key", pa.int64()), ("rows", pa.int64())])


def exchange(
    job: LabelJob,
    items: Sequence[Item],
    task: Callable[[Item], pa.Table],
    reduce: Callable[[pa.Table], pa.Table],
    *,
    kind: str,
    rows: int,
) -> None:
    """Write ``reduce(rows of a key)`` to ``part-<key>`` of the work folder ``kind``, for every key.

    ``task`` returns tables of one schema with the column ``key`` (int64), about ``rows`` rows in all. ``reduce`` gets
    its rows in no particular order. Keys whose file exists are skipped before the shuffle, so a killed run redoes only
    the others.
    """
    folder = job.out.work(kind)
    skip = broadcast(pa.array([item["number"] for item in job.work_items(kind)], pa.int64()))

    def route(item: Item) -> pa.Table:
        table = task(item)
        return table.filter(pc.invert(pc.is_in(table["key"], value_set=skip())))

    def finish(group: pa.Table) -> pa.Table:
        key = group["key"][0].as_py()
        result = reduce(group.drop_columns(["key"]))
        write_table(storage.join(folder, part_name(key)), result)
        return pa.table([[key], [result.num_rows]], schema=_WRITTEN)

    if rows <= LOCAL_ROWS:

        def whole(_: Item) -> pa.Table:
            groups = split_by_key(pa.concat_tables([route(item) for item in items])) if items else ()
            return pa.concat_tables([_WRITTEN.empty_table(), *(finish(group) for group in groups)])

        written = job.map(ONE_TASK, whole)
    else:
        partitions = max(num_partitions(items), num_buckets(rows))
        grouped = job.map(list(items), route).groupby("key", num_partitions=partitions)
        written = grouped.map_groups(finish, batch_format="pyarrow", concurrency=job.config.concurrency)
    for _ in track(blocks_of(written), f"labels {kind}", unit="block"):
        pass


def return_rows(job: LabelJob, source: str, kind: str, rows: int, columns: list[str] | None = None) -> None:
    """Write the rows of the work folder ``source`` to ``kind``, one file per corpus part, in the order of the corpus.

    ``rows``: about how many there are; ``columns``: all, or ``row`` and some others.
    """

    def task(item: Item) -> pa.Table:
        table = read_table(item["uri"], columns)
        return with_key(table, table["row"].to_numpy() >> ROW_SHIFT)

    exchange(job, job.work_items(source), task, lambda part: part.sort_by("row"), kind=kind, rows=rows)


def split_by_key(table: pa.Table) -> Iterator[pa.Table]:
    """The rows of each key, keys ascending."""
    table = table.sort_by("key")
    keys = table["key"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)] if len(keys) else []
    for start, stop in pairwise(edges):
        yield table.slice(start, stop - start)


def read_part(folder: str, number: int, schema: pa.Schema) -> pa.Table:
    """A part of a work folder; an empty table of ``schema`` if it was not written."""
    uri = storage.join(folder, part_name(number))
    return read_table(uri) if storage.exists(uri) else schema.empty_table()


def fill_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with the columns of ``schema``, all null where it has none."""
    return pa.concat_tables([schema.empty_table(), table], promote_options="default").select(schema.names)


def with_key(table: pa.Table, key: NDArray[np.integer]) -> pa.Table:
    """``table`` with the column ``key`` (int64)."""
    return table.append_column("key", pa.array(np.asarray(key, np.int64)))


def num_buckets(rows: int) -> int:
    """Number of buckets over which a hash spreads ``rows`` rows."""
    return max(1, -(-rows // ROWS_PER_PARTITION))


def bucket_rows(rows: NDArray[np.integer], buckets: int) -> NDArray[np.int64]:
    """Bucket of each row number, by hash."""
    return (mix_keys(np.asarray(rows).astype(np.uint64), 0, "rows") % np.uint64(buckets)).astype(np.int64)


def total(job: LabelJob, items: Sequence[Item], task: Callable[[Item], Sequence[int]]) -> list[int]:
    """Element-wise sum, modulo 2^64, of the whole numbers that ``task`` returns for each item; empty without items."""

    def as_row(item: Item) -> pa.Table:
        return pa.table({"numbers": pa.array([task(item)], pa.list_(pa.uint64()))})

    blocks = blocks_of(job.map(list(items), as_row)) if items else ()
    sums = [np.array(block["numbers"].to_pylist(), np.uint64).sum(axis=0) for block in blocks]
    return [int(value) for value in np.array(sums, np.uint64).sum(axis=0)] if sums else []
