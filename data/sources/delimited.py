"""CSV and its relatives: tables of text with a header, whose cells are separated by commas, semicolons, tabs or bars.

A quote that is not closed would swallow the rows after it. Lines are therefore kept until their row is read; if it
turns out to be none, only its first line is refused and the others are read again, as rows of their own.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, BinaryIO

from lookalike.data.sources.bounds import UnpackedError
from lookalike.data.sources.columns import resolve
from lookalike.data.sources.reader import IMAGE_SUFFIXES, SOURCE_FORMATS, Reader, Record, Unit, unreadable
from lookalike.data.sources.tables import SAMPLE_BYTES, SAMPLE_ROWS, open_buffered
from lookalike.errors import CorpusError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
UNQUOTED = "or set quoted: false if its quotes are characters like others"
DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # which Excel writes above the header


class Lines:
    """The lines of a text, with their ends; those of the current row can be given back."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._most = self._room = most  # characters of a row, and what is left of them
        self._text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        self._waiting: deque[str] = deque()
        self.taken: list[str] = []
        """Lines since ``begin``."""
        self.before = 0
        """Lines before them."""

    def begin(self) -> None:
        """A row begins at the next line."""
        self.before += len(self.taken)
        self.taken = []
        self._room = self._most

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._text.readline(self._most)
        if not line:
            raise StopIteration
        if len(line) == self._most and line[-1] not in "\r\n":
            while (piece := self._text.readline(self._most)) and piece[-1] not in "\r\n":
                pass
            self.taken.append("")
            raise csv.Error(f"the line has more than {self._most} characters")
        self.taken.append(line)
        self._room -= len(line)
        if self._room < 0:
            raise csv.Error(f"the row has more than {self._most} characters")
        return line

    def give_back(self, keep: int = 1) -> None:
        """Read the lines of this row again, but for the first ``keep``."""
        self._waiting.extendleft(reversed(self.taken[keep:]))
        del self.taken[keep:]


class Table:
    """The rows of a file below its header; ``columns``: corpus field -> position of its cell."""

    def __init__(self, lines: Lines, reader: Reader, uri: str) -> None:
        self._lines = lines
        self._quoting: Any = csv.QUOTE_MINIMAL if reader.source.quoted else csv.QUOTE_NONE
        self.header, self.delimiter = _read_header(lines, reader, uri, self._quoting)
        names = resolve(reader.source.columns, self.header, f"source {uri}", reader.natural) if self.header else {}
        self.columns = {field: self.header.index(name) for field, name in names.items()}
        self.repeated = sorted({name for name in names.values() if self.header.count(name) > 1})

    def records(self) -> Iterator[Record]:
        """The rows as records, as written: whole doubles in a column of doubles become floats."""
        rows = self._rows()
        sample = _sample(rows)
        cells = [row for row in sample if isinstance(row, list)]
        doubles = {field for field, place in self.columns.items() if _are_doubles([row[place] for row in cells])}
        for row in chain(sample, rows):
            if isinstance(row, dict):
                yield row
                continue
            record: Record = {field: row[place] or None for field, place in self.columns.items()}
            for field in doubles:
                if record[field] is not None and _is_double(record[field]):
                    record[field] = float(record[field])
            yield record

    def _rows(self) -> Iterator[list[str] | Record]:
        """The cells of each row, or the record that stands for a row that cannot be read."""
        lines = self._lines
        rows = csv.reader(lines, delimiter=self.delimiter, quoting=self._quoting, strict=True)
        while True:
            lines.begin()
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield self._refuse(str(error))
                continue
            if row is None:
                return
            fits = len(row) == len(self.header)
            if len(lines.taken) > 1 and self._has_swallowed(fits):
                yield self._refuse("the rows after it stand in its cell")
            elif fits:
                yield row
            elif row:
                rule = f"line {lines.before + 1} has {len(row)} cells, the header has {len(self.header)}; correct it"
                yield unreadable("wrong_number_of_cells", rule, **self._key())

    def _has_swallowed(self, fits: bool) -> bool:
        """Whether lines after the first look like rows; where the row ``fits``, like rows that name a picture."""
        place = self.columns.get("image_uri")
        for line in self._lines.taken[1:]:
            cells = self._split(line)
            if len(cells) != len(self.header):
                continue
            if not fits:
                return True
            named = place is not None and cells[place].lower().endswith(IMAGE_SUFFIXES)
            if named and '"' not in "".join(cells):  # else it is the end of a cell, and the beginning of others
                return True
        return False

    def _refuse(self, error: str) -> Record:
        lines = self._lines
        first, count = lines.before + 1, len(lines.taken)
        key = self._key()
        lines.give_back()
        if count < 2 and "unexpected end" not in error:
            reason = "too_long" if "more than" in error or "larger than" in error else "not_csv"
            remedy = f"correct it, {UNQUOTED}" if reason == "not_csv" else "cut it, or raise bounds.max_record_bytes"
            return unreadable(reason, f"line {first}: {error}; {remedy}", **key)
        told = f"the quote that opens in line {first} took {count} lines, up to line {first + count - 1} ({error})"
        return unreadable("open_quote", f"{told}; close it, {UNQUOTED}. The other lines were read as rows", **key)

    def _key(self) -> dict[str, Any]:
        """Id and image of a row that cannot be read, as far as its first line shows them."""
        cells = self._split(self._lines.taken[0])
        places = {field: self.columns.get(field) for field in ("image_id", "image_uri")}
        return {field: cells[at] for field, at in places.items() if at is not None and at < len(cells)}

    def _split(self, line: str) -> list[str]:
        try:
            return next(csv.reader([line], delimiter=self.delimiter, quoting=self._quoting), [])
        except csv.Error:
            return []


def _sample(rows: Iterator[list[str] | Record]) -> list[list[str] | Record]:
    """The next ``SAMPLE_ROWS`` rows; fewer once they have ``SAMPLE_BYTES`` characters."""
    kept: list[list[str] | Record] = []
    size = 0
    for row in islice(rows, SAMPLE_ROWS):
        kept.append(row)
        size += sum(map(len, row)) + 8 * len(row) if isinstance(row, list) else 0
        if size >= SAMPLE_BYTES:
            break
    return kept


def _is_double(cell: str) -> bool:
    """Whether a cell is what programs write for a double: ``712.0``, but not ``712`` or ``7.10``."""
    try:
        return repr(float(cell)) == cell
    except ValueError:
        return False


def _are_doubles(cells: list[str]) -> bool:
    given = [cell for cell in cells if cell]
    return bool(given) and all(map(_is_double, given))


def _read_header(lines: Lines, reader: Reader, uri: str, quoting: Any) -> tuple[list[str], str]:
    """The names in the first row that is not blank, and the delimiter under which the columns are found there.

    Raises ``CorpusError`` if there is none; its message is about the delimiter that makes the most cells.
    """
    lines.begin()
    mapped = set(reader.source.columns.values())
    usual = "\t" if ".tsv" in uri.lower()[-7:] else ","
    failures: list[tuple[float, CorpusError]] = []
    for delimiter in (usual, *(other for other in DELIMITERS if other != usual)):
        lines.give_back(0)
        try:
            rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            row = next((row for row in rows if row and not _SEPARATOR_LINE.fullmatch(lines.taken[-1])), [])
            header = [name if name in mapped else name.strip() for name in row]
            if header:
                resolve(reader.source.columns, header, f"source {uri}", reader.natural)
            return header, delimiter
        except csv.Error as error:
            told = f"source {uri}, line {len(lines.taken)}: the header is no CSV ({error}); correct it"
            failures.append((1.5 if delimiter == usual else 0, CorpusError(told)))
        except CorpusError as error:
            note = "" if delimiter == usual else f" (cells separated by {delimiter!r})"
            failures.append((len(header), CorpusError(f"{error}{note}")))
    raise max(failures, key=lambda failure: failure[0])[1]


@SOURCE_FORMATS.register("csv")
class CsvReader(Reader):
    """A unit is a file, read as a stream: line ends inside quotes look like ends of records, so a file cannot be cut.

    A table too large for one task should be several files, or JSON lines or parquet.
    """

    suffixes = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        try:
            with self._table(uri) as table:
                header, repeated = table.header, table.repeated
        except UnpackedError:  # told when it is read
            yield {"uri": uri}
            return
        if repeated:
            log.warning("repeated columns %s", fields(file=uri, columns=repeated, read="the first of each"))
        if header:
            yield {"uri": uri}

    @contextmanager
    def _table(self, uri: str) -> Iterator[Table]:
        most = self.source.bounds.max_record_bytes
        csv.field_size_limit(most)
        lines = None
        try:
            with open_buffered(uri, self.source.encoding, self.source.bounds) as file:
                lines = Lines(file, most)
                yield Table(lines, self, uri)
        except CorpusError as error:
            at = 0 if lines is None else lines.before + len(lines.taken)
            raise CorpusError(f"{error} (after line {at})" if "cannot be read" in str(error) else str(error)) from None

    def read(self, unit: Unit) -> Iterator[Record]:
        try:
            with self._table(unit["uri"]) as table:
                yield from table.records()
        except UnpackedError as error:
            yield unreadable(error.reason, str(error))
