"""Tables in Arrow's types: parquet, Arrow IPC and Feather, folders of Hugging Face's ``datasets``, Lance."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.data.intake.columns import check_list, find_columns, list_size, read_piece
from lookalike.data.intake.files import FORMATS, HF_STATE, Piece, VectorFile, Where
from lookalike.data.parts import row_groups
from lookalike.data.sources import lance
from lookalike.entries import escaped
from lookalike.errors import UsageError
from lookalike.registry import Registry

READ_BYTES = 4 << 20  # of a column of parquet at a time


class TableFile(Protocol):
    """A table of which any rows can be read."""

    schema: pa.Schema
    num_rows: int

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        """``columns`` of the rows ``start`` to ``stop``, at most ``rows`` at a time."""


TABLES: Registry[Callable[[str], TableFile]] = Registry("table_format")
"""Ending -> how a file is opened; raises ``UsageError`` if it is damaged."""


def damage_told(uri: str, what: str) -> AbstractContextManager[None]:
    """Raise ``UsageError`` for what readers raise where a file is damaged, or its columns have one name."""

    def tell(told: str) -> UsageError:
        return UsageError(f"{escaped(uri)} is not readable {what} ({told}); replace or remove it")

    return lance.damage_told(tell, KeyError, TypeError, AttributeError)


@TABLES.register("parquet")
class ParquetTable:
    """A parquet file; row groups outside the wanted rows are not read."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with damage_told(uri, "parquet"), storage.arrow_file(uri) as opened:
            metadata = pq.ParquetFile(opened)
            self.schema, self.num_rows = metadata.schema_arrow, metadata.metadata.num_rows

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        with damage_told(self.uri, "parquet"), storage.arrow_file(self.uri) as opened:
            file = pq.ParquetFile(opened, buffer_size=READ_BYTES)
            groups, row = row_groups(file, start, stop)
            for batch in file.iter_batches(rows, row_groups=groups, columns=list(columns)):
                begin, end = max(start - row, 0), min(stop - row, batch.num_rows)
                row += batch.num_rows
                if end > begin:
                    yield pa.Table.from_batches([batch.slice(begin, end - begin)])


@TABLES.register("arrow")
class ArrowTable:
    """A file of Arrow IPC: the format with a footer (Feather), or the stream format (Hugging Face)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with damage_told(uri, "Arrow IPC"), self._open() as reader:
            self.schema = reader.schema
            self._sizes = [batch.num_rows for batch in _batches(reader, 0)]
        self.num_rows = sum(self._sizes)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        local = storage.is_local(self.uri)
        with pa.memory_map(storage.local_path(self.uri)) if local else storage.arrow_file(self.uri) as opened:
            magic = opened.read(6)
            opened.seek(0)
            yield pa.ipc.open_file(opened) if magic == b"ARROW1" else pa.ipc.open_stream(opened)

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        ends = np.cumsum(self._sizes, dtype=np.int64)
        first = int(np.searchsorted(ends, start, side="right"))
        row = int(ends[first - 1]) if first else 0
        with damage_told(self.uri, "Arrow IPC"), self._open() as reader:
            for batch in _batches(reader, first):
                if row >= stop:
                    return
                begin, end = max(start - row, 0), min(stop - row, batch.num_rows)
                row += batch.num_rows
                table = pa.Table.from_batches([batch]).select(list(columns))
                if end > begin:
                    table.validate(full=True)  # offsets of a damaged file would lead out of its buffers
                for place in range(begin, end, rows):
                    yield table.slice(place, min(rows, end - place))


def _batches(reader: Any, first: int) -> Iterator[pa.RecordBatch]:
    """Record batches from number ``first`` on; a stream has to pass over the ones before."""
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(first, reader.num_record_batches))
    return itertools.islice(reader, first, None)


TABLES.register("feather")(ArrowTable)
TABLES.register("ipc")(ArrowTable)


@TABLES.register("hf")
class DatasetFolder:
    """A data set that Hugging Face's ``save_to_disk`` wrote: its Arrow files, one after the other."""

    def __init__(self, uri: str) -> None:
        with damage_told(uri, "as a data set of Hugging Face"):
            state = json.loads(storage.read_bytes(storage.join(uri, HF_STATE)))
            names = [str(entry["filename"]) for entry in state["_data_files"]]
            if state.get("_indices_data_files"):
                raise UsageError(f"{escaped(uri)} keeps its order apart from its rows; save flatten_indices() of it")
        if bad := next((name for name in names if not storage.is_plain(name)), None):
            raise UsageError(f"{escaped(uri)}: state.json names {bad!r}, which lies outside the folder; save it again")
        if not names:
            raise UsageError(f"{escaped(uri)}: state.json names no file; save the data set again")
        self._files = [ArrowTable(storage.join(uri, name)) for name in names]
        self.schema, self.num_rows = self._files[0].schema, sum(file.num_rows for file in self._files)

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        row = 0
        for file in self._files:
            begin, end = max(start - row, 0), min(stop - row, file.num_rows)
            row += file.num_rows
            if end > begin:
                yield from file.read(begin, end, rows, columns)


@TABLES.register("lance")
class LanceTable:
    """The version of a Lance data set that is the latest when it is opened."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with damage_told(uri, "as a Lance data set"):
            self._dataset = lance.open_dataset(uri)
            self.schema, self.num_rows = self._dataset.schema, self._dataset.count_rows()

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        with damage_told(self.uri, "as a Lance data set"):
            scanner = self._dataset.scanner(
                columns=list(columns), offset=start, limit=stop - start, batch_size=rows, scan_in_order=True
            )
            for batch in scanner.to_batches():
                yield pa.Table.from_batches([batch])


class TableVectors(VectorFile):
    """A table with a column of vectors."""

    def __init__(self, uri: str, table: TableFile, where: Where) -> None:
        super().__init__(uri)
        self._table, self.num_rows = table, table.num_rows
        self._vector, self.id_column = find_columns(table.schema, where, uri)
        kind = table.schema.field(self._vector).type
        check_list(kind, uri, integers=where.integers)
        self.columns = tuple(name for name in table.schema.names if name != self._vector)
        self.kind = str(kind).replace("element: ", "").replace("item: ", "")
        self.dim = list_size(kind) or self._first_size()

    def _first_size(self) -> int:
        """The most frequent size above 0 of the first lists that are not all null or empty; 0 if all are."""
        for table in self._table.read(0, self.num_rows, 1024, [self._vector]):
            sizes = np.asarray(pc.fill_null(pc.list_value_length(table[self._vector]), 0), np.int64)
            if sizes.any():
                return int(np.bincount(sizes[sizes > 0]).argmax())
        return 0

    def pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        for table in self._table.read(start, stop, rows, [self._vector, *self.columns]):
            yield read_piece(table, self._vector, self.dim)


def _register(ending: str) -> None:
    def opened(uri: str, where: Where, work: str | None) -> VectorFile:
        return TableVectors(uri, TABLES.get(ending)(uri), where)

    FORMATS.register(ending)(opened)


for _ending in ("parquet", "arrow", "feather", "ipc", "hf", "lance"):
    _register(_ending)
