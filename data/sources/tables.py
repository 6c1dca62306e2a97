"""JSON lines and CSV: tables without a schema that name their images by URI."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, BinaryIO, cast

from lookalike import storage
from lookalike.data.sources.columns import candidates, paths_of_records, pick_fields, resolve
from lookalike.data.sources.reader import SOURCE_FORMATS, UNREADABLE, Reader, Record, Unit
from lookalike.errors import CorpusError

MAX_LINE_BYTES = 64 << 20  # a longer line or cell is refused instead of held in memory
SAMPLE_ROWS = 1000  # lines from which columns and the mean length of a line are read
SAMPLE_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20


@contextmanager
def open_buffered(uri: str) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked when its name ends in ``.gz``."""
    fs, path = storage.resolve(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    try:
        with fs.open(path, "rb", compression=compression) as file, io.BufferedReader(file, BUFFER_BYTES) as buffered:
            yield cast(BinaryIO, buffered)
    except (EOFError, OSError) as error:
        raise CorpusError(f"source {uri} cannot be read ({error}); replace or remove it") from None


def read_lines(file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[bytes | None]:
    """The lines whose first byte lies in [start, stop), without line ends; None for a line that is too long.

    Adjacent ranges yield every line of a file once, wherever the cuts fall.
    """
    position = start
    if start:
        file.seek(start - 1)
        position += sum(len(piece) for piece in _rest_of_line(file)) - 1
    while stop is None or position < stop:
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        position += len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            position += sum(len(piece) for piece in _rest_of_line(file))
            yield None
        else:
            yield line.rstrip(b"\r\n")


def _rest_of_line(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.readline(MAX_LINE_BYTES):
        yield piece
        if piece.endswith(b"\n"):
            return


def parse_object(line: bytes | None) -> dict[str, Any]:
    """The JSON object in a line, or ``{UNREADABLE: reason}``. Invalid UTF-8 becomes lone surrogates."""
    if line is None:
        return {UNREADABLE: "too_long"}
    try:
        value = json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return {UNREADABLE: "not_json"}
    return value if isinstance(value, dict) else {UNREADABLE: "not_an_object"}


@SOURCE_FORMATS.register("jsonl")
class JsonlReader(Reader):
    """A unit is a range of bytes, with the lines that begin in it. A packed file is one unit."""

    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        lines = self._sample(uri)
        records = [record for line in lines if UNREADABLE not in (record := parse_object(line))]
        if records:
            resolve(self.source.columns, paths_of_records(records), f"source {uri}", self.natural)
        if uri.lower().endswith(".gz"):
            yield {"uri": uri, "start": 0, "stop": None}
            return
        size = storage.size_bytes(uri)
        mean = sum(len(line) + 1 for line in lines) / max(len(lines), 1)
        count = -(-size // max(int(mean * rows_per_part), 1))
        cuts = [size * number // count for number in range(count + 1)] if count else []
        for start, stop in pairwise(cuts):
            yield {"uri": uri, "start": start, "stop": stop}

    def _sample(self, uri: str) -> list[bytes]:
        with open_buffered(uri) as file:
            return [line for line in islice(read_lines(file, 0, SAMPLE_BYTES), SAMPLE_ROWS) if line]

    def read(self, unit: Unit) -> Iterator[Record]:
        wanted = candidates(self.source.columns, self.natural)
        with open_buffered(unit["uri"]) as file:
            for line in read_lines(file, unit["start"], unit["stop"]):
                if line is None or line.strip():
                    record = parse_object(line)
                    yield record if UNREADABLE in record else pick_fields(record, wanted)


@SOURCE_FORMATS.register("csv")
class CsvReader(Reader):
    """A unit is a file, read as a stream: line ends inside quotes look like ends of records, so a file cannot be cut.

    A table too large for one task should be several files, or JSON lines or parquet.
    """

    suffixes = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        with self._rows(uri) as rows:
            header = next(rows, [])
        if header:
            resolve(self.source.columns, header, f"source {uri}", self.natural)
            yield {"uri": uri}

    @contextmanager
    def _rows(self, uri: str) -> Iterator[Iterator[list[str]]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        with open_buffered(uri) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            delimiter = "\t" if ".tsv" in uri.lower()[-7:] else ","
            yield csv.reader(text, delimiter=delimiter, strict=True)

    def read(self, unit: Unit) -> Iterator[Record]:
        with self._rows(unit["uri"]) as rows:
            header = next(rows)
            columns = resolve(self.source.columns, header, f"source {unit['uri']}", self.natural)
            places = {field: header.index(column) for field, column in columns.items()}
            while True:
                try:
                    row = next(rows, None)
                except csv.Error:
                    yield {UNREADABLE: "not_csv"}
                    continue
                if row is None:
                    return
                if len(row) == len(header):
                    yield {field: row[place] or None for field, place in places.items()}
                elif row:
                    yield {UNREADABLE: "wrong_number_of_cells"}
