"""Row groups of parquet files: a row group is shuffled, handed to a worker and held in memory as one.

Errors name file and row group, so that a damaged shard is found among thousands.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.errors import ArtifactError

THREADS = 16  # a store answers slowly but in parallel
REMEDY = "remove the folder of its artifact and run its stage again"


@dataclass(frozen=True)
class RowGroup:
    """One row group of one shard file."""

    uri: str
    number: int
    num_rows: int

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"{self.uri}, row group {self.number}"


def list_row_groups(uris: Sequence[str]) -> list[RowGroup]:
    """All row groups of parquet files, in file order; any other file raises ``ArtifactError``."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [row_group for row_groups in pool.map(_row_groups_of, uris) for row_group in row_groups]


def _row_groups_of(uri: str) -> list[RowGroup]:
    filesystem, path = storage.arrow_filesystem(uri)
    with explained(uri):
        meta = pq.read_metadata(path, filesystem=filesystem)
        return [RowGroup(uri, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]


def read_row_group(row_group: RowGroup, columns: list[str] | None = None) -> pa.Table:
    """Rows of a row group, or some of their columns; a missing or damaged file raises ``ArtifactError``."""
    filesystem, path = storage.arrow_filesystem(row_group.uri)
    with explained(row_group.place), pq.ParquetFile(path, filesystem=filesystem) as file:
        table = file.read_row_group(row_group.number, columns=columns)
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise ArtifactError(
            f"{row_group.uri} has no column {', '.join(missing)}; it has {', '.join(file.schema.names)}"
        )
    return table


def split_attributes(row_group: RowGroup, table: pa.Table, fields: Sequence[str], names: Sequence[str]) -> pa.Table:
    """``table`` with a column int32 [n] for each of ``fields`` (``attribute.colour``), -1 unknown.

    ``names``: all attributes, in the order of the column ``attributes``; a row without a value for each raises
    ``ArtifactError``.
    """
    if not fields:
        return table
    if "attributes" not in table.column_names:
        raise ArtifactError(
            f"{row_group.uri} has no column 'attributes', though its classes.json names {', '.join(names)}; {REMEDY}"
        )
    lists = table["attributes"].combine_chunks()
    sizes = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    if (sizes != len(names)).any():
        wrong = int(np.flatnonzero(sizes != len(names))[0])
        raise ArtifactError(
            f"{row_group.place}: column 'attributes' holds {lists[wrong].as_py()} in row {wrong}, but "
            f"classes.json names {len(names)}: {', '.join(names)}; {REMEDY}"
        )
    values = pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(-1, len(names))
    for field in fields:
        column = np.ascontiguousarray(values[:, names.index(field.partition(".")[2])])
        table = table.append_column(field, pa.array(column, pa.int32()))
    return table


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn errors of pyarrow and file systems into an ``ArtifactError`` about ``place``."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{place} does not exist; {REMEDY}") from None
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{place} cannot be read: {first}; if the file is damaged, {REMEDY}") from error
