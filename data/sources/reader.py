"""The settings of a source, and the interface of the readers that open it."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.data.sources.bounds import ReadBounds
from lookalike.data.sources.columns import FIELDS, GATHERED, TEXT
from lookalike.data.sources.fetch_rules import FetchRules
from lookalike.entries import PROBLEMS, ending, escaped, list_entries
from lookalike.errors import CorpusError, UsageError
from lookalike.registry import Registry, nearest

Record = dict[str, Any]
"""Corpus field -> raw value; fields that the record lacks are absent."""
Unit = dict[str, Any]
"""The slice of a file that one task reads, as plain JSON values; ``uri`` names the file."""

UNREADABLE = "unreadable"  # key of a record that could not be read; its value is the reason
DETAIL = "detail"  # key beside it: what was found, and the remedy
REFUSED = "refused"  # key of a unit of records that are known to be unreadable: (entry, reason, detail) of each
PASSED_OVER = "passed_over"  # key of such a unit: ending -> files of the source that no record stands for
MAX_ENDINGS = 100  # that are counted one by one
BATCH_ROWS = 256  # rows of a columnar file decoded at a time
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"),
)
"""Endings of the formats that ``vision.images`` reads."""


class RecordSource(Config):
    """One set of raw records."""

    uri: str
    """A file, or a folder, whose files are read in the order of their names. Links to folders are not followed."""
    format: str = "parquet"
    """Storage format of the records: a name in the registry ``source_format``."""
    dataset: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    """Name of the data set that the rows belong to."""
    columns: dict[str, str | None] = Field(default={})
    """Corpus field -> column of the source, where the names differ. ``meta.title`` reaches into nested fields; null
    means that the column of that name is not read. ``attributes: {colour: paint, material: made_of}`` gathers plain
    columns; ``attributes.colour: paint`` does the same beside a column that holds attributes."""
    constants: dict[str, str] = Field(default={})
    """Corpus field -> value for records that have none: a licence or a locale that holds for the whole source."""
    base_uri: str | None = None
    """Folder of relative image URIs; None: the folder of the source."""
    fetch: FetchRules = FetchRules()
    """What a row may name besides files below the base, and for how long an image may be fetched."""
    bounds: ReadBounds = ReadBounds()
    """How much the source may unpack to."""
    id_prefix: str = Field("", max_length=100)
    """Prefix of every image id, for ids that would collide with those of another source."""
    encoding: str | None = None
    """Encoding of the text of CSV and JSON lines, such as ``cp1252``; None: UTF-8, or UTF-16 or UTF-32 where the first
    bytes of a file say so."""
    quoted: bool = True
    """Whether cells of a CSV may stand in quotes; false: a quote is a character like others, as in many exports to TSV,
    and every line is a row."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of groups (of images, where there is no group) that is held out if a row does not name its split."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        SOURCE_FORMATS.get(value)
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                b"a".decode(value, "ignore")
            except LookupError:
                raise UsageError("not an encoding that Python knows; use cp1252, utf-16, shift_jis ...") from None
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        given = value.get("attributes") if isinstance(value, Mapping) else None
        if not isinstance(given, Mapping):
            return value
        return {**value, "attributes": None, **{f"{GATHERED}{name}": column for name, column in given.items()}}

    @field_validator("columns", "constants")
    @classmethod
    def _known_fields(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        mapped = info.field_name == "columns"
        allowed = FIELDS if mapped else TEXT
        for field in value:
            if field not in allowed and not (mapped and field.startswith(GATHERED) and field[len(GATHERED) :].strip()):
                raise UsageError(
                    f"{info.field_name} names {field!r}, which is not a corpus field"
                    f"{nearest(field, list(allowed))}; fields: {', '.join(allowed)}"
                )
        return value


def unreadable(reason: str, detail: str, **known: Any) -> Record:
    """A record that is refused for ``reason``; ``known``: its ``image_id`` or ``image_uri``, as far as it was read."""
    return {UNREADABLE: reason, DETAIL: detail, **known}


class Reader(ABC):
    """Reads one source. A new format implements ``units`` and ``read`` and usually names its ``suffixes``."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings, in lower case, of the files that it reads in a folder."""
    natural: ClassVar[Mapping[str, str]] = {}
    """Corpus field -> the column that holds it in this format if the recipe maps none."""

    def __init__(self, source: RecordSource, max_bytes: int) -> None:
        self.source = source
        self.max_bytes = max_bytes
        """At most this many bytes of an image are read, and one more, by which ``records`` knows what to refuse."""
        self.refused: list[tuple[str, str, str]] = []
        """(name, reason, detail) of entries of the source's folder that are no files."""
        self.only: frozenset[str] | None = None
        """Corpus fields that are wanted; columnar formats read no others. None: all."""
        self.passed_over: Counter[str] = Counter()
        """Ending -> files of the source's folder that this format does not read."""

    def files(self) -> list[str]:
        """URIs of the source's files in record order; raises ``CorpusError`` if there are none.

        Fills ``refused`` and ``passed_over``.
        """
        names = []
        for name, problem in list_entries(self.source.uri):
            if problem is not None:
                self.refused.append((name, problem, PROBLEMS[problem]))
            elif name == "" or self.accepts(name):
                names.append(name)
            else:
                self.passed_over[ending(name)] += 1
        if not names:
            raise CorpusError(
                f"source {self.source.uri} has no {self.source.format} file{self.others()}; give a file, or a folder "
                f"of files whose names end in {', '.join(self.suffixes)}"
            )
        return [storage.join(self.source.uri, name) if name else self.source.uri for name in names]

    def others(self) -> str:
        """What there is instead of files to read, in parentheses."""
        found = [f"{count} of {name}" for name, count in self.passed_over.most_common(5)]
        found += [f"{escaped(name)}: {reason}, {detail}" for name, reason, detail in self.refused[:3]]
        return f" ({'; '.join(found)})" if found else ""

    def has_table(self) -> bool:
        """Whether the source is a folder of files that a table in it names, so that some may be left out."""
        return False

    def left_out(self, keys: npt.NDArray[np.uint64]) -> Counter[str]:
        """Ending -> files of the source's folder that its table does not name; ``keys``: of the names that it does."""
        return Counter()

    def rest(self) -> Unit | None:
        """What ``files`` and ``units`` met and no other unit stands for; None if there is nothing."""
        if not self.refused and not self.passed_over:
            return None
        counts = dict(self.passed_over.most_common(MAX_ENDINGS))
        if more := self.passed_over.total() - sum(counts.values()):
            counts["(other endings)"] = more
        return {"uri": self.source.uri, REFUSED: self.refused, PASSED_OVER: counts}

    def records(self, unit: Unit) -> Iterator[Record]:
        """The records of any unit, one of ``rest`` too."""
        if REFUSED not in unit:
            return self.read(unit)
        return iter([self.refuse(name, reason, detail) for name, reason, detail in unit[REFUSED]])

    def refuse(self, name: str, reason: str, detail: str) -> Record:
        """The record that stands for an entry of the source's folder that is not read."""
        return unreadable(reason, detail, image_id=name, image_uri=storage.join(self.source.uri, name))

    def accepts(self, name: str) -> bool:
        """Whether to read a file of the source's folder, given its relative name."""
        return name.lower().endswith(self.suffixes)

    def wanted(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Those of the ``columns`` (corpus field -> column) whose field is wanted."""
        return {
            field: column
            for field, column in columns.items()
            if self.only is None or field.partition(".")[0] in self.only
        }

    @property
    def base(self) -> str:
        """Folder of relative image URIs."""
        if self.source.base_uri is not None:
            return self.source.base_uri
        uri = self.source.uri.rstrip("/")
        return uri.rpartition("/")[0] if uri.lower().endswith(self.suffixes) else uri

    @abstractmethod
    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        """Cut a file into slices of about ``rows_per_part`` records, in record order.

        Raises ``CorpusError`` if the file cannot be opened or its columns do not fit.
        """

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[Record]:
        """The records of a unit in order; one that cannot be read has the key ``UNREADABLE``, see ``unreadable``."""


SOURCE_FORMATS: Registry[type[Reader]] = Registry("source_format")
