"""WebDataset: tar files in which the members of a record share their name up to the first dot."""

import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, NamedTuple, Self

from lookalike import storage
from lookalike.data.sources.columns import candidates, paths_of_records, pick_fields, resolve
from lookalike.data.sources.folder import IMAGE_SUFFIXES
from lookalike.data.sources.reader import SOURCE_FORMATS, UNREADABLE, Reader, Record, Unit
from lookalike.data.sources.tables import parse_object

SAMPLE_RECORDS = 100
MAX_TEXT_BYTES = 64 << 20  # of a member that is not an image


class _StrictHeader(tarfile.TarInfo):
    """Raises an error for a damaged or cut header, which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class TarMember(NamedTuple):
    """A file of an archive."""

    key: str
    """Path up to the first dot of the name."""
    extension: str
    """Lower case."""
    content: bytes


def read_members(file: IO[bytes], max_image_bytes: int) -> Iterator[TarMember]:
    """The files of a tar stream in order; images are cut to ``max_image_bytes`` + 1.

    Raises ``tarfile.ReadError`` if the stream is not a tar, is damaged or ends too early.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictHeader) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                image = f".{extension.lower()}" in IMAGE_SUFFIXES
                content = tar.extractfile(member)
                assert content is not None
                most = max_image_bytes + 1 if image else MAX_TEXT_BYTES
                data = content.read(most)
                if len(data) < min(member.size, most):
                    raise tarfile.ReadError("unexpected end of data")
                yield TarMember(f"{folder}/{stem}" if folder else stem, extension.lower(), data)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise tarfile.ReadError(str(error)) from None


def group_members(members: Iterator[TarMember]) -> Iterator[dict[str, Any]]:
    """One mapping per key: ``__key__``, ``image``, the content of a ``.json`` and other members by extension.

    If the archive is damaged, the record at that place is ``{UNREADABLE: "damaged_archive"}`` and the last.
    """
    record: dict[str, Any] = {}
    try:
        for key, extension, data in members:
            if record and record["__key__"] != key:
                yield record
                record = {}
            record = _add(record or {"__key__": key}, extension, data)
    except tarfile.ReadError:
        yield {UNREADABLE: "damaged_archive"}
        return
    if record:
        yield record


def _add(record: dict[str, Any], extension: str, data: bytes) -> dict[str, Any]:
    if f".{extension}" in IMAGE_SUFFIXES:
        return {**record, "image": data}
    if extension == "json":
        return {**parse_object(data), **record}
    return {**record, extension: data}


@SOURCE_FORMATS.register("webdataset")
class WebDatasetReader(Reader):
    """A unit is a tar file, read as a stream from its start to its end; ``.txt`` is a title, ``.cls`` a category."""

    suffixes = (".tar", ".tar.gz", ".tgz")
    natural = {"image_id": "__key__", "title": "txt", "category": "cls"}
    _columns_seen = False

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        """See ``Reader``; the first records of the first file with any show whether the columns fit."""
        if not self._columns_seen:
            sample = [record for record in islice(self._records(uri), SAMPLE_RECORDS) if UNREADABLE not in record]
            if sample:
                resolve(self.source.columns, paths_of_records(sample), f"source {uri}", self.natural)
                self._columns_seen = True
        yield {"uri": uri}

    def _records(self, uri: str) -> Iterator[dict[str, Any]]:
        fs, path = storage.resolve(uri)
        with fs.open(path, "rb") as file:
            yield from group_members(read_members(file, self.max_bytes))

    def read(self, unit: Unit) -> Iterator[Record]:
        wanted = candidates(self.source.columns, self.natural)
        for record in self._records(unit["uri"]):
            yield {UNREADABLE: record[UNREADABLE]} if UNREADABLE in record else pick_fields(record, wanted)
