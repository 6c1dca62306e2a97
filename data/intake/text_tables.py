"""Tables of text: CSV, TSV and JSON lines. Every cell stays the text it is, so that an id 007 is not 7."""

import csv
import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from lookalike.data.intake.tables import TableFile
from lookalike.data.sources.delimited import DELIMITERS
from lookalike.data.sources.tables import open_buffered
from lookalike.data.sources.texts import read_text
from lookalike.entries import escaped
from lookalike.errors import UsageError
from lookalike.registry import Registry

MAX_CELL_CHARS = 1 << 20
SAMPLE_ROWS = 1024
Row = dict[str, Any]

TEXT_TABLES: Registry[Callable[[str], TableFile]] = Registry("text_table_format")
"""Ending -> how a file is opened."""


class _TextTable(ABC):
    """Rows from the first to the last; there is no way to begin in the middle."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        sample = list(itertools.islice(self.rows(), SAMPLE_ROWS))
        names = dict.fromkeys(name for row in sample for name in row)
        self.schema = pa.schema([(name, pa.string()) for name in names])
        self.num_rows = sum(1 for _ in self.rows()) if len(sample) == SAMPLE_ROWS else len(sample)

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows as name -> cell; raises ``UsageError`` with the line that is none."""

    def read(self, start: int, stop: int, rows: int, columns: list[str]) -> Iterator[pa.Table]:
        """``columns`` as strings, at most ``rows`` rows at a time."""
        wanted = itertools.islice(self.rows(), start, stop)
        while batch := list(itertools.islice(wanted, rows)):
            texts = {name: [read_text(row.get(name), MAX_CELL_CHARS)[0] for row in batch] for name in columns}
            yield pa.table({name: pa.array(values, pa.string()) for name, values in texts.items()})

    @contextmanager
    def _text(self) -> Iterator[Any]:
        try:
            with open_buffered(self.uri) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
                yield text
        except UnicodeDecodeError as error:
            raise UsageError(f"{escaped(self.uri)} is not UTF-8 ({error.reason}); save it as UTF-8") from None


@TEXT_TABLES.register("csv")
class CsvTable(_TextTable):
    """A header, then a row a line; cells are separated by what separates the names of the header."""

    delimiters: tuple[str, ...] = DELIMITERS

    def rows(self) -> Iterator[Row]:
        with self._text() as text:
            header = text.readline(MAX_CELL_CHARS)
            delimiter = max(self.delimiters, key=header.count)
            names = next(csv.reader([header], delimiter=delimiter), [])
            if not any(names):
                raise UsageError(f"{escaped(self.uri)} has no header; its first line must name the columns")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UsageError(f"{escaped(self.uri)} has two columns {twice!r}; rename or remove one")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                for cells in reader:
                    if cells and len(cells) != len(names):
                        raise UsageError(
                            f"{escaped(self.uri)}, line {reader.line_num + 1}: {len(cells)} cells for {len(names)} "
                            "columns; quote the cells that hold the separator"
                        )
                    if cells:
                        yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
            except csv.Error as error:
                raise UsageError(f"{escaped(self.uri)}, line {reader.line_num + 1}: {error}; repair the line") from None


@TEXT_TABLES.register("tsv")
class TsvTable(CsvTable):
    """CSV with tabs."""

    delimiters = ("\t",)


@TEXT_TABLES.register("jsonl")
class JsonTable(_TextTable):
    """One JSON object a line."""

    def rows(self) -> Iterator[Row]:
        with self._text() as text:
            for number, line in enumerate(text, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{escaped(self.uri)}, line {number}: no JSON ({error}); repair it") from None
                if not isinstance(row, dict):
                    raise UsageError(f"{escaped(self.uri)}, line {number} is no JSON object; write one a line")
                yield row


TEXT_TABLES.register("ndjson")(JsonTable)
