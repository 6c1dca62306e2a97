"""JSON lines, and the text of tables without a schema, which name their images by URI."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from typing import Any, BinaryIO, cast

from lookalike import storage
from lookalike.data.sources.bounds import (
    BUFFER_BYTES,
    DAMAGED,
    MAX_RECORD_BYTES,
    ReadBounds,
    UnpackedError,
    open_unpacked,
)
from lookalike.data.sources.columns import candidates, paths_of_records, pick_fields, resolve
from lookalike.data.sources.reader import SOURCE_FORMATS, UNREADABLE, Reader, Record, Unit, unreadable
from lookalike.errors import CorpusError

_BETWEEN = re.compile(r"[\s,]*")
SAMPLE_ROWS = 1000  # lines from which columns and the mean length of a line are read
SAMPLE_BYTES = 4 << 20

BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""First bytes -> encoding; those of UTF-32 come first, because they begin like those of UTF-16."""

ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
}
"""Which of the first four bytes are zero in a text that begins with ASCII -> encoding."""

codecs.register_error("lookalike.mark", lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))


class _Recoded(io.RawIOBase):
    """A text in another encoding as UTF-8. What cannot be decoded becomes bytes that are no UTF-8 either."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file, self._waiting = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("lookalike.mark")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            chunk = self._file.read(BUFFER_BYTES)
            self._waiting = self._decoder.decode(chunk, final=not chunk).encode("utf-8", "surrogatepass")
            if not chunk:
                break
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size


def sniff_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 if the first bytes of a text say so, by a mark or by the zeros around ASCII; else None."""
    for mark, encoding in BOMS.items():
        if start.startswith(mark):
            return encoding
    zeros = tuple(byte == 0 for byte in start[:4])
    return ZEROS.get(zeros)


@contextmanager
def open_buffered(uri: str, encoding: str | None = None, bounds: ReadBounds | None = None) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked when its name ends in ``.gz``; a text of another ``encoding`` as UTF-8.

    Without ``encoding`` UTF-16 and UTF-32 are recognised. Recoded text cannot be sought. Raises ``CorpusError`` if the
    file is damaged, ``UnpackedError`` where it unpacks to more than ``bounds`` allow.
    """
    try:
        with open_unpacked(uri, bounds or ReadBounds()) as buffered:
            name = sniff_encoding(buffered.peek(4)[:4]) if encoding is None else codecs.lookup(encoding).name
            plain = name in {None, "utf-8", "utf-8-sig", "ascii"}
            text = buffered if plain else io.BufferedReader(_Recoded(buffered, str(name)), BUFFER_BYTES)
            yield cast(BinaryIO, text)
    except DAMAGED as error:
        raise CorpusError(f"source {uri} cannot be read ({error}); replace or remove it") from None


def read_lines(
    file: BinaryIO, start: int = 0, stop: int | None = None, most: int = MAX_RECORD_BYTES
) -> Iterator[bytes | None]:
    """The lines whose first byte lies in [start, stop), without line ends; None for one of more than ``most`` bytes.

    Adjacent ranges yield every line of a file once, wherever the cuts fall.
    """
    position = start
    if start:
        file.seek(start - 1)
        position += sum(len(piece) for piece in _rest_of_line(file, most)) - 1
    while stop is None or position < stop:
        line = file.readline(most)
        if not line:
            return
        position += len(line)
        if len(line) == most and not line.endswith(b"\n"):
            position += sum(len(piece) for piece in _rest_of_line(file, most))
            yield None
        else:
            yield line.rstrip(b"\r\n")


def _rest_of_line(file: BinaryIO, most: int) -> Iterator[bytes]:
    while piece := file.readline(most):
        yield piece
        if piece.endswith(b"\n"):
            return


def parse_object(line: bytes | None, most: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """The JSON object in a line, or an ``unreadable`` record. Invalid UTF-8 becomes lone surrogates."""
    if line is None:
        return unreadable("too_long", f"a line has more than {most} bytes; cut it, or raise bounds.max_record_bytes")
    text = line.decode("utf-8-sig", "surrogateescape")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return unreadable("not_json", f"{error}, in {text[:100]!r}; a line holds one whole object")
    return _object(value)


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return unreadable("not_an_object", f"{str(value)[:100]!r} is no JSON object with the fields of a record")


def _begins_array(start: bytes) -> bool:
    return re.match(rb"\s*\[\s*([{\]]|$)", start.removeprefix(codecs.BOM_UTF8)) is not None


def read_array(file: BinaryIO, uri: str, most: int = MAX_RECORD_BYTES) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one JSON array, read as a stream; ``unreadable`` records for other values.

    Raises ``CorpusError`` with the line at which the array is no JSON.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
    decoder = json.JSONDecoder()
    waiting, place, lines = text.read(BUFFER_BYTES).replace("[", " ", 1), 0, 1
    while True:
        place = cast(re.Match[str], _BETWEEN.match(waiting, place)).end()
        if waiting[place : place + 1] == "]":
            return
        try:
            value, place = decoder.raw_decode(waiting, place)
        except (ValueError, RecursionError) as error:
            more = text.read(BUFFER_BYTES) if len(waiting) - place < most else ""
            if not more:
                lines += waiting.count("\n", 0, getattr(error, "pos", place))
                raise CorpusError(f"source {uri}, line {lines}: the array is no JSON ({error}); correct it") from None
            lines += waiting.count("\n", 0, place)
            waiting, place = waiting[place:] + more, 0
            continue
        yield _object(value)


def _sample(lines: Iterator[bytes | None]) -> list[bytes]:
    """The first lines that are not blank; fewer if their file unpacks too far."""
    kept: list[bytes] = []
    with suppress(UnpackedError):
        for line in islice(lines, SAMPLE_ROWS):
            if line and line.strip():
                kept.append(line)
    return kept


@SOURCE_FORMATS.register("jsonl")
class JsonlReader(Reader):
    """A unit is a range of bytes, with the lines that begin in it. A packed file is one unit."""

    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        bounds = self.source.bounds
        most = bounds.max_record_bytes
        with open_buffered(uri, self.source.encoding, bounds) as file:
            whole, array = (
                uri.lower().endswith(".gz") or not file.seekable(),
                _begins_array(cast(io.BufferedReader, file).peek()),
            )
            lines = _sample(read_lines(file, 0, SAMPLE_BYTES, most))
        if array and (len(lines) < 2 or parse_object(lines[0])[UNREADABLE] == "not_json"):
            with suppress(UnpackedError), open_buffered(uri, self.source.encoding, bounds) as file:
                self._resolve(islice(read_array(file, uri, most), SAMPLE_ROWS), uri)
            yield {"uri": uri, "array": True}
            return
        self._resolve((parse_object(line) for line in lines), uri)
        if whole:
            yield {"uri": uri, "start": 0, "stop": None}
            return
        size = storage.size_bytes(uri)
        mean = sum(len(line) + 1 for line in lines) / max(len(lines), 1)
        count = -(-size // max(int(mean * rows_per_part), 1))
        cuts = [size * number // count for number in range(count + 1)] if count else []
        for start, stop in pairwise(cuts):
            yield {"uri": uri, "start": start, "stop": stop}

    def _resolve(self, sample: Iterable[Record], uri: str) -> None:
        if records := [record for record in sample if UNREADABLE not in record]:
            resolve(self.source.columns, paths_of_records(records), f"source {uri}", self.natural)

    def read(self, unit: Unit) -> Iterator[Record]:
        wanted = candidates(self.source.columns, self.natural)
        for record in self._objects(unit):
            yield record if UNREADABLE in record else pick_fields(record, wanted)

    def _objects(self, unit: Unit) -> Iterator[dict[str, Any]]:
        number, bounds = 0, self.source.bounds
        most = bounds.max_record_bytes
        try:
            with open_buffered(unit["uri"], self.source.encoding, bounds) as file:
                if "array" in unit:
                    yield from read_array(file, unit["uri"], most)
                    return
                for number, line in enumerate(read_lines(file, unit["start"], unit["stop"], most), 1):  # noqa: B007
                    if line is None or line.strip():
                        yield parse_object(line, most)
        except UnpackedError as error:
            yield unreadable(error.reason, str(error))
        except CorpusError as error:  # of a packed file, whose lines are counted from its start
            raise CorpusError(f"{error} (line {number + 1})" if number else str(error)) from None
