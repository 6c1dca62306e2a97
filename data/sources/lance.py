"""Lance data sets, read by the ``pylance`` package (extra ``lance``)."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lookalike import storage
from lookalike.data.sources.columns import arrow_records, resolve_schema, top_level
from lookalike.data.sources.reader import BATCH_ROWS, SOURCE_FORMATS, Reader, Record, Unit
from lookalike.errors import CorpusError, UsageError


@SOURCE_FORMATS.register("lance")
class LanceReader(Reader):
    """A unit is a range of rows of the version that was the latest when the units were planned."""

    suffixes = (".lance",)

    def files(self) -> list[str]:
        """The data set itself, whose files only Lance opens."""
        return [storage.absolute(self.source.uri)]

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        dataset = _open(uri)
        resolve_schema(self.source.columns, dataset.schema, f"source {uri}", self.natural)
        rows = dataset.count_rows()
        for start in range(0, rows, rows_per_part):
            yield {"uri": uri, "version": dataset.version, "start": start, "stop": min(start + rows_per_part, rows)}

    def read(self, unit: Unit) -> Iterator[Record]:
        dataset = _open(unit["uri"], unit["version"])
        columns = resolve_schema(self.source.columns, dataset.schema, f"source {unit['uri']}", self.natural)
        scanner = dataset.scanner(
            columns=top_level(dataset.schema, list(columns.values())),
            offset=unit["start"],
            limit=unit["stop"] - unit["start"],
            batch_size=BATCH_ROWS,
            scan_in_order=True,
        )
        for batch in scanner.to_batches():
            yield from arrow_records(pa.Table.from_batches([batch]), columns)


def _open(uri: str, version: int | None = None) -> Any:
    try:
        import lance
    except ImportError:
        raise UsageError("sources of format 'lance' need the package pylance: pip install 'lookalike[lance]'") from None
    try:
        return lance.dataset(uri, version=version)
    except (ValueError, OSError) as error:
        raise CorpusError(f"source {uri} is not a readable Lance data set ({error}); replace or remove it") from None
