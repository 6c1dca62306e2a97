"""A folder of images, with a metadata table (as Hugging Face's imagefolder has it) or without."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from lookalike import storage
from lookalike.data.sources.columns import candidates, pick_fields
from lookalike.data.sources.delimited import CsvReader
from lookalike.data.sources.parquet import ParquetReader
from lookalike.data.sources.reader import IMAGE_SUFFIXES, SOURCE_FORMATS, Reader, Record, Unit
from lookalike.data.sources.tables import JsonlReader
from lookalike.entries import PROBLEMS, ending, escaped, is_hidden, walk
from lookalike.errors import CorpusError
from lookalike.sampling import stable_keys

KEYS_AT_A_TIME = 65_536
BY_NAME = {"image_id": "file_name", "image_uri": "file_name"}


class _Jsonl(JsonlReader):
    natural = BY_NAME


class _Csv(CsvReader):
    natural = BY_NAME


class _Parquet(ParquetReader):
    natural = BY_NAME


METADATA: dict[str, type[Reader]] = {"metadata.jsonl": _Jsonl, "metadata.csv": _Csv, "metadata.parquet": _Parquet}


NOT_READ = (
    f"only one of {', '.join(METADATA)} in the source's own folder is read, and images beside others are read by name; "
    "give its folder as a source of its own, or remove it"
)


@SOURCE_FORMATS.register("folder")
class FolderReader(Reader):
    """Reads the metadata table if there is one, else the images, by name; then a unit is a range of names.

    The id of an image is its path in the folder (``file_name``), its category the folder it lies in (``folder``),
    unless the recipe or the table says otherwise. Names that begin with a dot are passed over. Metadata tables that are
    not read, such as those of subfolders, are refused by name.
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
        if kind is None:
            return None
        table = kind(self.source, self.max_bytes)
        table.only = self.only
        return table

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        if (table := self._table(uri)) is not None:
            yield from table.units(uri, rows_per_part)
            return
        first = name = ""
        count = 0
        for name, problem in walk(*storage.resolve(uri)):
            if not self._has_record(name, problem):
                self.passed_over[ending(name)] += 1
                continue
            first = first if count else name
            count += 1
            if count == rows_per_part:
                yield {"uri": uri, "first": first, "last": name}
                count = 0
        if count:
            yield {"uri": uri, "first": first, "last": name}

    def has_table(self) -> bool:
        return self.files() != [self.source.uri]

    def left_out(self, keys: npt.NDArray[np.uint64]) -> Counter[str]:
        counts: Counter[str] = Counter()
        names = (entry.name for entry in walk(*storage.resolve(self.source.uri)) if entry.name not in METADATA)
        while batch := list(islice(names, KEYS_AT_A_TIME)):
            named = np.isin(stable_keys([escaped(name) for name in batch]), keys)
            counts.update(ending(name) for name, found in zip(batch, named, strict=True) if not found)
        return counts

    def _has_record(self, name: str, problem: str | None) -> bool:
        table = name.rpartition("/")[2].lower().startswith("metadata.")
        return not is_hidden(name) and (problem is not None or table or self.accepts(name))

    def read(self, unit: Unit) -> Iterator[Record]:
        if (table := self._table(unit["uri"])) is not None:
            yield from table.read(unit)
            return
        wanted = candidates(self.source.columns, self.natural)
        fs, root = storage.resolve(unit["uri"])
        for name, problem in walk(fs, root, unit["first"], unit["last"]):
            if not self._has_record(name, problem):
                continue
            if problem is not None:
                yield self.refuse(name, problem, PROBLEMS[problem])
            elif self.accepts(name):
                yield pick_fields({"file_name": name, "folder": name.rpartition("/")[0] or None}, wanted)
            else:
                yield self.refuse(name, "metadata_not_read", NOT_READ)
