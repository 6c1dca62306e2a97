"""The settings of a source, and the interface of the readers that open it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.data.sources.columns import FIELDS, GATHERED, TEXT
from lookalike.data.sources.fetch_rules import FetchRules
from lookalike.errors import CorpusError, UsageError
from lookalike.registry import Registry, nearest

Record = dict[str, Any]
"""Corpus field -> raw value; fields that the record lacks are absent."""
Unit = dict[str, Any]
"""The slice of a file that one task reads, as plain JSON values; ``uri`` names the file."""

UNREADABLE = "unreadable"  # the only key of a record that could not be read; its value is the reason
BATCH_ROWS = 256  # rows of a columnar file decoded at a time


class RecordSource(Config):
    """One set of raw records."""

    uri: str
    """A file, or a folder, whose files are read in the order of their names."""
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
    id_prefix: str = Field("", max_length=100)
    """Prefix of every image id, for ids that would collide with those of another source."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of groups (of images, where there is no group) that is held out if a row does not name its split."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        SOURCE_FORMATS.get(value)
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

    def files(self) -> list[str]:
        """URIs of the source's files in record order; raises ``CorpusError`` if there are none."""
        names = [name for name in storage.list_files(self.source.uri) if name == "" or self.accepts(name)]
        if not names:
            raise CorpusError(
                f"source {self.source.uri} has no {self.source.format} file; give a file, or a folder of "
                f"files whose names end in {', '.join(self.suffixes)}"
            )
        return [storage.join(self.source.uri, name) if name else self.source.uri for name in names]

    def accepts(self, name: str) -> bool:
        """Whether to read a file of the source's folder, given its relative name."""
        return name.lower().endswith(self.suffixes)

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
        """The records of a unit in order; a record that cannot be read is ``{UNREADABLE: reason}``."""


SOURCE_FORMATS: Registry[type[Reader]] = Registry("source_format")
