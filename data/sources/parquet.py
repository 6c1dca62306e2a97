"""Parquet files whose rows hold an image (bytes, or Hugging Face's struct of bytes and path) or its URI."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.data.parts import row_groups
from lookalike.data.sources.bounds import claim_of_rows, limited_memory
from lookalike.data.sources.columns import arrow_records, resolve_schema, top_level
from lookalike.data.sources.reader import BATCH_ROWS, SOURCE_FORMATS, Reader, Record, Unit, unreadable
from lookalike.errors import CorpusError

FEW_ROWS = 8
READ_BYTES = 8 << 20  # of a column at a time; else all of it in a row group


def cut_groups(sizes: Sequence[int], rows_per_part: int) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of about ``rows_per_part`` rows, for row groups of ``sizes``.

    Whole small groups are joined; a group larger than a part is cut into equal slices.
    """
    start = stop = 0
    for size in sizes:
        if stop > start and stop - start + size > rows_per_part:
            yield start, stop
            start = stop
        slices = -(-size // rows_per_part)
        for number in range(1, slices):
            yield start, stop + size * number // slices
            start = stop + size * number // slices
        stop += size
    if stop > start:
        yield start, stop


@SOURCE_FORMATS.register("parquet")
class ParquetReader(Reader):
    """A unit is a range of rows of one file."""

    suffixes = (".parquet",)

    def units(self, uri: str, rows_per_part: int) -> Iterator[Unit]:
        """See ``Reader``; a file that claims more rows than its size can hold is one unreadable record."""
        try:
            with storage.arrow_file(uri) as file:
                metadata = pq.read_metadata(file)
                schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name may be no UTF-8
            raise CorpusError(f"source {uri} is not a readable parquet file ({error}); replace or remove it") from None
        self._columns(schema, uri)
        if claim := claim_of_rows(metadata.num_rows, storage.size_bytes(uri), self.source.bounds):
            yield {"uri": uri, "claim": claim}
            return
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        for start, stop in cut_groups(sizes, rows_per_part):
            yield {"uri": uri, "start": start, "stop": stop}

    def _columns(self, schema: pa.Schema, uri: str) -> dict[str, str]:
        return self.wanted(resolve_schema(self.source.columns, schema, f"source {uri}", self.natural))

    def read(self, unit: Unit) -> Iterator[Record]:
        if "claim" in unit:
            yield unreadable("claims_too_many_rows", unit["claim"])
            return
        row = unit["start"]
        for rows in (BATCH_ROWS, FEW_ROWS, 1):
            try:
                for records in self._pieces({**unit, "start": row}, rows):
                    yield from records
                    row += len(records)
                return
            except MemoryError:  # the rest in smaller pieces
                continue
        megabytes = self.source.bounds.max_memory_bytes >> 20
        told = f"row {row} needs more than {megabytes} MiB, and what follows it in its row group is not reached"
        for _ in range(row, unit["stop"]):
            yield unreadable("needs_too_much_memory", f"{told}; replace it, or raise bounds.max_memory_bytes")

    def _pieces(self, unit: Unit, rows: int) -> Iterator[list[Record]]:
        """Records of up to ``rows`` rows at a time; ``MemoryError`` where these need more than the bound."""
        with storage.arrow_file(unit["uri"]) as opened:
            with limited_memory(self.source.bounds):
                file = pq.ParquetFile(opened, buffer_size=READ_BYTES)
                columns = self._columns(file.schema_arrow, unit["uri"])
                groups, row = row_groups(file, unit["start"], unit["stop"])
                needed = top_level(file.schema_arrow, list(columns.values()))
                batches = file.iter_batches(rows, row_groups=groups, columns=needed, use_threads=False)
            while True:
                with limited_memory(self.source.bounds):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    begin, end = max(unit["start"] - row, 0), min(unit["stop"] - row, batch.num_rows)
                    row += batch.num_rows
                    piece = pa.Table.from_batches([batch.slice(begin, max(end - begin, 0))])
                    records = list(arrow_records(piece, columns))
                yield records
