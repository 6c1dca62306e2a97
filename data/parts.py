"""The only wiring between pure functions and Ray Data: one item (a part of a corpus) in, one Arrow table out.

A part is the unit of work and of resumption: a task reads one part, writes its results under names that depend on the
part's number, and returns a small table. So results depend neither on blocks nor on workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.errors import LookalikeError

FOLD_ROWS = 1 << 20  # rows that are collected before they are summed
MAX_BLOCKS = 4096  # the driver keeps one reference per block; more parts than this share blocks
Item = dict[str, Any]


def map_parts(
    items: Sequence[Item], task: Callable[[Item], pa.Table], *, concurrency: int | None = None, num_gpus: float = 0
) -> Any:
    """A lazy ``ray.data.Dataset`` of the tables that ``task`` returns for ``items``; ``num_gpus``: GPUs per task."""
    import ray

    def each(block: pa.Table) -> Iterator[pa.Table]:
        for item in block.to_pylist():
            yield task(item)

    blocks = max(1, min(len(items), MAX_BLOCKS))
    dataset = ray.data.from_items(list(items), override_num_blocks=blocks)
    return dataset.map_batches(
        each, batch_format="pyarrow", batch_size=None, concurrency=concurrency, num_gpus=num_gpus or None
    )


def num_partitions(items: Sequence[Item], most: int | None = None) -> int:
    """Partitions of a shuffle of the items' tables: two per CPU, at most one per item, at most ``most``."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    return max(1, min(len(items), 2 * cpus, len(items) if most is None else most))


def blocks_of(dataset: Any) -> Iterator[pa.Table]:
    """The dataset's non-empty tables as they arrive. A ``LookalikeError`` of a task is raised here unchanged."""
    from ray.exceptions import RayTaskError

    try:
        for block in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
            if block.num_rows:
                yield block
    except RayTaskError as error:
        if isinstance(error.cause, LookalikeError):
            raise error.cause from None  # without the worker's traceback in its message
        raise


def collect(dataset: Any, schema: pa.Schema) -> pa.Table:
    """All rows of a small dataset as one table of ``schema``."""
    tables = [block.select(schema.names).cast(schema) for block in blocks_of(dataset)]
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


def add_up(blocks: Iterable[pa.Table], keys: list[str], schema: pa.Schema) -> pa.Table:
    """One row per key, sorted by ``keys``, with the sums of the other columns of ``schema``.

    Tables are folded as they arrive: memory grows with the distinct keys, not with the tables.
    """
    total, waiting = schema.empty_table(), 0
    pending: list[pa.Table] = []
    for block in blocks:
        pending.append(block.select(schema.names).cast(schema))
        waiting += block.num_rows
        if waiting > FOLD_ROWS + total.num_rows:
            total, pending, waiting = _sum([total, *pending], keys, schema), [], 0
    return _sum([total, *pending], keys, schema).sort_by([(key, "ascending") for key in keys])


def _sum(tables: Sequence[pa.Table], keys: list[str], schema: pa.Schema) -> pa.Table:
    values = [name for name in schema.names if name not in keys]
    summed = pa.concat_tables(tables).group_by(list(keys)).aggregate([(name, "sum") for name in values])
    renamed = summed.rename_columns([name.removesuffix("_sum") for name in summed.column_names])
    return renamed.select(schema.names).cast(schema)


def sum_images(
    counts: Any, keys: list[str], partitions: int, keep: Callable[[pa.Table], pa.Table], schema: pa.Schema
) -> pa.Table:
    """The sums of ``images`` per key of the dataset ``counts``, by a shuffle; only rows that ``keep`` returns."""
    from ray.data.aggregate import Sum

    total = counts.groupby(list(keys), partitions).aggregate(Sum("images", alias_name="images"))
    return collect(total.map_batches(keep, batch_format="pyarrow", batch_size=None), schema)


def broadcast(value: Any) -> Callable[[], Any]:
    """Put ``value`` into the object store once; return a function that fetches it inside a task."""
    import ray

    reference = ray.put(value)
    return lambda: ray.get(reference)


def part_name(number: int, suffix: str = "parquet") -> str:
    """File name of part ``number``."""
    return f"part-{number:06d}.{suffix}"


def part_items(files: list[str]) -> list[Item]:
    """An item for each file: its number, in the given order, and its URI."""
    return [{"number": number, "uri": uri} for number, uri in enumerate(files)]


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns."""
    filesystem, path = storage.arrow_filesystem(uri)
    return pq.ParquetFile(path, filesystem=filesystem).read(columns=None if columns is None else list(columns))


def row_groups(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups with the rows ``start`` to ``stop`` of a file, and the number of the first row in them."""
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    first, last = (int(np.searchsorted(ends, row, side="right")) for row in (start, stop - 1))
    return list(range(file.num_row_groups))[first : last + 1], int(ends[first - 1]) if first else 0


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a parquet file; a reader sees all of it or nothing."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    storage.write_atomic(uri, sink.getvalue().to_pybytes())


class PartWriter:
    """Writes tables one after the other into files of at most ``rows_per_file`` rows, each atomically.

    ``uri_of`` names file 0, 1, ...; empty files are not written. A context manager: if its block raises, the unfinished
    file is discarded.
    """

    def __init__(self, uri_of: Callable[[int], str], schema: pa.Schema, rows_per_file: int | None = None) -> None:
        self.uris: list[str] = []
        self._uri_of, self._schema, self._rows_per_file = uri_of, schema, rows_per_file
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._room = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, table: pa.Table) -> None:
        """Append rows; each call begins a new row group."""
        while table.num_rows:
            if self._writer is None:
                self._start()
            assert self._writer is not None
            rows = table.num_rows if self._rows_per_file is None else min(table.num_rows, self._room)
            self._writer.write_table(table.slice(0, rows))
            self._room -= rows
            table = table.slice(rows)
            if self._room == 0:
                self._open.close()
                self._writer = None

    def _start(self) -> None:
        self.uris.append(self._uri_of(len(self.uris)))
        file = self._open.enter_context(storage.open_atomic(self.uris[-1]))
        self._writer = self._open.enter_context(pq.ParquetWriter(file, self._schema, compression="zstd"))
        self._room = self._rows_per_file or -1
