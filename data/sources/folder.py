"""A folder of images, with a metadata table (as Hugging Face's imagefolder has it) or without."""

from collections.abc import Iterator
from typing import Any

from lookalike import storage
from lookalike.data.sources.columns import candidates, pick_fields
from lookalike.data.sources.parquet import ParquetReader
from lookalike.data.sources.reader import SOURCE_FORMATS, Reader, Record, Unit
from lookalike.data.sources.tables import CsvReader, JsonlReader
from lookalike.errors import CorpusError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
BY_NAME = {"image_id": "file_name", "image_uri": "file_name"}


class _Jsonl(JsonlReader):
    natural = BY_NAME


class _Csv(CsvReader):
    natural = BY_NAME


class _Parquet(ParquetReader):
    natural = BY_NAME


METADATA: dict[str, type[Reader]] = {"metadata.jsonl": _Jsonl, "metadata.csv": _Csv, "metadata.parquet": _Parquet}


def walk_files(fs: Any, root: str, first: str | None = None, last: str | None = None) -> Iterator[str]:
    """Relative paths of the files below ``root`` from ``first`` to ``last``, sorted folder by folder.

    Lists one folder at a time, and only those that may hold such a file. Skips names that begin with a dot and links to
    folders.
    """
    low = () if first is None else tuple(first.split("/"))
    high = None if last is None else tuple(last.split("/"))

    def below(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
        entries = {
            entry["name"].rstrip("/").rpartition("/")[2]: entry
            for entry in fs.ls(folder, detail=True)
            if entry["name"].rstrip("/") != folder
        }
        for name in sorted(entries):
            entry, place = entries[name], (*parts, name)
            if name.startswith(".") or place < low[: len(place)] or (high is not None and place > high):
                continue
            if entry["type"] == "directory":
                if not entry.get("islink"):
                    yield from below(entry["name"].rstrip("/"), place)
            elif place >= low:
                yield "/".join(place)

    return below(root.rstrip("/"), ())


@SOURCE_FORMATS.register("folder")
class FolderReader(Reader):
    """Reads the metadata table if there is one, else the images, by name; then a unit is a range of names.

    The id of an image is its path in the folder (``file_name``), its category the folder it lies in (``folder``),
    unless the recipe or the table says otherwise.
    """

    suffixes = IMAGE_SUFFIXES
    natural = {**BY_NAME, "category": "folder"}

    @property
    def base(self) -> str:
        return self.source.base_uri or self.source.uri

    def files(self) -> list[str]:
        """The metadata table, or the folder itself."""
        tables = [uri for name in METADATA if storage.exists(uri := storage.join(self.source.uri, name))]
        if len(tables) > 1:
            raise CorpusError(f"source {self.source.uri} has several metadata tables ({', '.join(tables)}); keep one")
        return tables or [self.source.uri]

    def _table(self, uri: str) -> Reader | None:
        kind = METADATA.get(uri.rpartition("/")[2])
        return None if kind is None else kind(self.source, self.max_bytes)

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        if (table := self._table(uri)) is not None:
            yield from table.units(uri, rows_per_part)
            return
        first = name = ""
        count = 0
        for name in filter(self.accepts, walk_files(*storage.resolve(uri))):
            first = first if count else name
            count += 1
            if count == rows_per_part:
                yield {"uri": uri, "first": first, "last": name}
                count = 0
        if count:
            yield {"uri": uri, "first": first, "last": name}

    def read(self, unit: Unit) -> Iterator[Record]:
        if (table := self._table(unit["uri"])) is not None:
            yield from table.read(unit)
            return
        wanted = candidates(self.source.columns, self.natural)
        fs, root = storage.resolve(unit["uri"])
        for name in filter(self.accepts, walk_files(fs, root, unit["first"], unit["last"])):
            yield pick_fields({"file_name": name, "folder": name.rpartition("/")[0] or None}, wanted)
