"""WebDataset: tar files in which the members of a record share their name up to the first dot."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any, BinaryIO, NamedTuple, Self, cast

from lookalike.data.sources.bounds import DAMAGED, MAX_RECORD_BYTES, UnpackedError, open_unpacked
from lookalike.data.sources.columns import candidates, paths_of_records, pick_fields, resolve
from lookalike.data.sources.reader import IMAGE_SUFFIXES, SOURCE_FORMATS, UNREADABLE, Reader, Record, Unit, unreadable
from lookalike.data.sources.tables import parse_object
from lookalike.entries import ending
from lookalike.errors import CorpusError
from lookalike.vision.images import ImageError

SAMPLE_RECORDS = 100
SAMPLE_PATHS = 10_000
MAX_ZEROS = 1 << 16  # empty blocks in a row
MAX_HEADER_BYTES = 1 << 20  # of a member; long names are headers too
MAX_MEMBERS = 1000  # of a record
SORTED = "members of a key must follow each other: `tar --sort=name`"
SCATTERED = f"members of the key, an image not among them, come after other keys and were not read; {SORTED}"


class _StrictHeader(tarfile.TarInfo):
    """Raises an error for a damaged or cut header, which tarfile takes for the end of the archive.

    Empty blocks end an archive; another one may follow, as ``cat`` joins them. ``zeros`` counts those just before.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        zeros = getattr(tar, "zeros", 0)
        tar.zeros = 0  # type: ignore[attr-defined]
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if zeros == MAX_ZEROS:
                raise tarfile.ReadError(f"more than {MAX_ZEROS} empty blocks") from None
            tar.zeros = zeros + 1  # type: ignore[attr-defined]
            if hasattr(tar, "metered"):
                tar.metered.left = MAX_HEADER_BYTES
            raise
        except tarfile.HeaderError as error:
            if zeros and isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise  # the end of the last archive
            raise tarfile.ReadError(str(error)) from None


class TarMember(NamedTuple):
    """A file of an archive."""

    key: str
    """Path up to the first dot of the name."""
    extension: str
    """Lower case."""
    content: bytes | None
    """None if it is a link or a device."""
    cut: bool = False
    """Whether there is more of it than is read."""


class _Metered:
    """A stream of which tarfile may read ``left`` more bytes, because it holds headers of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"a header has more than {MAX_HEADER_BYTES} bytes")
        return data


def read_members(
    file: BinaryIO, max_image_bytes: int, hidden: Counter[str], most: int = MAX_RECORD_BYTES
) -> Iterator[TarMember]:
    """The files of a tar stream in order; images are cut to ``max_image_bytes`` + 1, others to ``most``.

    ``hidden`` counts what is no member of a record. The stream may hold several archives. Raises ``tarfile.ReadError``
    if it is no tar, is damaged or ends too early.
    """
    try:
        metered = _Metered(file)
        with tarfile.open(fileobj=cast(BinaryIO, metered), mode="r|", tarinfo=_StrictHeader, ignore_zeros=True) as tar:
            tar.metered = metered  # type: ignore[attr-defined]
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                if member.issparse():
                    raise tarfile.ReadError("a file is sparse")
                metered.left = MAX_HEADER_BYTES + (member.size if member.isfile() else 0)
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isdir():
                    continue
                if not stem:
                    hidden[ending(name)] += 1
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile():
                    yield TarMember(key, extension.lower(), None)
                    continue
                image = f".{extension.lower()}" in IMAGE_SUFFIXES
                content = tar.extractfile(member)
                assert content is not None
                size = min(member.size, max_image_bytes + 1 if image else most)
                data = content.read(size)
                if len(data) < size:
                    raise tarfile.ReadError("unexpected end of data")
                yield TarMember(key, extension.lower(), data, cut=size < member.size)
    except (tarfile.TarError, *DAMAGED) as error:
        raise tarfile.ReadError(str(error)) from None


def group_members(members: Iterator[TarMember], most: int = MAX_RECORD_BYTES) -> Iterator[dict[str, Any]]:
    """One mapping per key: ``__key__``, the content of a ``.json``, the members by extension, and the ``image``.

    ``image`` is the only member that is an image, or an ``ImageError`` if there are several. Members without an image
    that stand apart from others of their key are unreadable (``scattered_key``), as are those of more than ``most``
    bytes of text (``too_long``). If the archive is damaged, the record at that place is unreadable
    (``damaged_archive``) and the last.
    """
    seen: set[str] = set()
    try:
        for key, group in groupby(members, key=lambda member: member.key):
            record = _join(key, group, most)
            alone = UNREADABLE not in record and not isinstance(record.get("image"), (bytes, ImageError))
            yield unreadable("scattered_key", SCATTERED, image_id=key) if alone and key in seen else record
            seen.add(key)
    except tarfile.ReadError as error:
        yield unreadable("damaged_archive", f"{error}; what comes before it is read, replace the archive for the rest")
    except UnpackedError as error:
        yield unreadable(error.reason, str(error))


def _join(key: str, members: Iterator[TarMember], most: int) -> dict[str, Any]:
    """The record of members that follow each other; a member wins over a field of its ``.json`` with the same name."""
    parts: dict[str, bytes] = {}
    problem, texts = None, 0
    for number, member in enumerate(members):
        image = f".{member.extension}" in IMAGE_SUFFIXES
        texts += 0 if image else len(member.content or b"")
        if (member.cut and not image) or texts > most or number >= MAX_MEMBERS:
            told = f"its members have more than {most} bytes of text, or are more than {MAX_MEMBERS}"
            problem = ("too_long", f"{told}; shorten them, or raise bounds.max_record_bytes")
            parts.clear()
        if problem is not None:
            continue
        if member.content is None:
            problem = ("not_a_file", f".{member.extension} is a link or a device; use tar -h --hard-dereference")
        elif member.extension in parts:
            problem = ("repeated_member", f"there are several members .{member.extension} of it; keep one")
        parts[member.extension] = member.content or b""
    if problem is not None:
        return unreadable(*problem, image_id=key)
    record = parse_object(parts.pop("json")) if "json" in parts else {}
    if UNREADABLE in record:
        return {**record, "image_id": key}
    images = [name for name in parts if f".{name}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        told = f"its members .{', .'.join(images)} are images; map one, for example columns: {{image: {images[0]}}}"
        record["image"] = ImageError("several_images", told)
    elif images:
        record["image"] = parts[images[0]]
    return {**record, **parts, "__key__": key}


def explain_dots(members: list[str]) -> str | None:
    """What to do about members such as ``05.png`` of ``22.05.png``; None if there is none."""
    dotted = [name for name in members if "." in name and f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if not dotted:
        return None
    return (
        f"a key ends at the first dot of a file's name, so .{dotted[0]} is a member; if it is part of the name, "
        f"rename such files, else map it: columns: {{image: {dotted[0]}}}"
    )


@SOURCE_FORMATS.register("webdataset")
class WebDatasetReader(Reader):
    """A unit is a tar file, read as a stream from its start to its end; ``.txt`` is a title, ``.cls`` a category."""

    suffixes = (".tar", ".tar.gz", ".tgz")
    natural = {"image_id": "__key__", "title": "txt", "category": "cls"}
    _columns_seen = False

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        """See ``Reader``; the first records of the first file with any show whether the columns fit."""
        if not self._columns_seen:
            paths: dict[str, None] = {}
            for record in islice(self._records(uri), SAMPLE_RECORDS):
                if UNREADABLE not in record and len(paths) < SAMPLE_PATHS:
                    paths |= dict.fromkeys(paths_of_records([record]))
            self.passed_over.clear()  # counted when the file is read
            if paths:
                try:
                    resolve(self.source.columns, list(paths), f"source {uri}", self.natural)
                except CorpusError as error:
                    raise CorpusError("; ".join(filter(None, [str(error), explain_dots(list(paths))]))) from None
                self._columns_seen = True
        yield {"uri": uri}

    def _records(self, uri: str) -> Iterator[dict[str, Any]]:
        most = self.source.bounds.max_record_bytes
        with open_unpacked(uri, self.source.bounds, sniff=True) as file:
            yield from group_members(read_members(cast(BinaryIO, file), self.max_bytes, self.passed_over, most), most)

    def read(self, unit: Unit) -> Iterator[Record]:
        wanted = candidates(self.source.columns, self.natural)
        for record in self._records(unit["uri"]):
            if UNREADABLE in record:
                yield record
                continue
            picked = pick_fields(record, wanted)
            if picked.get("image") is None and picked.get("image_uri") is None:
                names = [name for name, value in record.items() if isinstance(value, bytes)]
                remedy = explain_dots(names) or f"map one that is, {SORTED}"
                members = ", ".join(f".{name}" for name in names)
                picked["image"] = ImageError("null", f"none of its members ({members}) is its image; {remedy}")
            yield picked
