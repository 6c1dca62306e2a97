"""Lance data sets, read by the ``pylance`` package (extra ``lance``)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from lookalike import storage
from lookalike.data.sources.bounds import FREE_BYTES, UnpackedError, claim_of_rows
from lookalike.data.sources.columns import arrow_records, resolve_schema, top_level
from lookalike.data.sources.reader import SOURCE_FORMATS, Reader, Record, Unit, unreadable
from lookalike.errors import CorpusError, LookalikeError, UsageError

PIECE_ROWS = 8  # decoded at a time: Lance has no bound of memory, and one value may stand in many rows


@SOURCE_FORMATS.register("lance")
class LanceReader(Reader):
    """A unit is a range of rows of the version that was the latest when the units were planned."""

    suffixes = (".lance",)

    def files(self) -> list[str]:
        """The data set itself, whose files only Lance opens."""
        return [storage.absolute(self.source.uri)]

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        with damage_told(_damage(uri)):
            yield from self._units(uri, rows_per_part)

    def _units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        dataset = open_dataset(uri)
        resolve_schema(self.source.columns, dataset.schema, f"source {uri}", self.natural)
        rows, version = dataset.count_rows(), dataset.version
        size = sum(file.file_size_bytes or 0 for part in dataset.get_fragments() for file in part.data_files())
        if claim := claim_of_rows(rows, size, self.source.bounds):
            yield {"uri": uri, "claim": claim}
            return
        for start in range(0, rows, rows_per_part):
            stop = min(start + rows_per_part, rows)
            yield {"uri": uri, "version": version, "start": start, "stop": stop, "size_bytes": size}

    def read(self, unit: Unit) -> Iterator[Record]:
        with damage_told(_damage(unit["uri"])):
            yield from self._read(unit)

    def _read(self, unit: Unit) -> Iterator[Record]:
        if "claim" in unit:
            yield unreadable("claims_too_many_rows", unit["claim"])
            return
        dataset = open_dataset(unit["uri"], unit["version"])
        columns = self.wanted(
            resolve_schema(self.source.columns, dataset.schema, f"source {unit['uri']}", self.natural)
        )
        scanner = dataset.scanner(
            columns=top_level(dataset.schema, list(columns.values())),
            offset=unit["start"],
            limit=unit["stop"] - unit["start"],
            batch_size=PIECE_ROWS,
            batch_readahead=1,
            scan_in_order=True,
        )
        decoded, most = 0, FREE_BYTES + self.source.bounds.max_ratio * unit["size_bytes"]
        row = unit["start"]
        for batch in scanner.to_batches():
            decoded += batch.nbytes
            if decoded > most:
                break
            yield from arrow_records(pa.Table.from_batches([batch]), columns)
            row += batch.num_rows
        for _ in range(row, unit["stop"]):
            yield unreadable(UnpackedError.reason, str(UnpackedError(self.source.bounds)))


def open_dataset(uri: str, version: int | None = None) -> Any:
    """The data set at ``uri``; ``UsageError`` if the package is not installed."""
    try:
        import lance
    except ImportError:
        raise UsageError("data sets of Lance need the package pylance: pip install 'lookalike[lance]'") from None
    return lance.dataset(uri, version=version)


@contextmanager
def damage_told(tell: Callable[[str], LookalikeError], *also: type[Exception]) -> Iterator[None]:
    """Raise what ``tell`` makes of the message where pyarrow and Lance, or ``also``, raise for a damaged file."""
    try:
        yield
    except LookalikeError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Lance's Rust code, which derives from BaseException
        if not panic and not isinstance(error, (ValueError, OSError, pa.ArrowException, *also)):
            raise
        raise tell(" ".join(str(error).split())[:300]) from None


def _damage(uri: str) -> Callable[[str], CorpusError]:
    return lambda told: CorpusError(f"source {uri} is not a readable Lance data set ({told}); replace or remove it")
