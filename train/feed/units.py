"""Row groups of parquet files: the unit that is shuffled, handed to a worker and held in memory.

What cannot be read is said with file and row group, for a shard that was damaged after it was written must be found
among thousands.
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

THREADS = 16  # a store's answer takes long and costs little: many are asked at a time
REMEDY = "remove the folder of its artifact and run its stage again"


@dataclass(frozen=True)
class Unit:
    """One row group of one shard file."""

    uri: str
    row_group: int
    num_rows: int

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"{self.uri}, row group {self.row_group}"


def list_units(uris: Sequence[str]) -> list[Unit]:
    """All row groups of parquet files, in file order; a file that is no parquet file raises ``ArtifactError``."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [unit for units in pool.map(_units_of, uris) for unit in units]


def _units_of(uri: str) -> list[Unit]:
    filesystem, path = storage.arrow_filesystem(uri)
    with explained(uri):
        meta = pq.read_metadata(path, filesystem=filesystem)
        return [Unit(uri, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]


def read_unit(unit: Unit, columns: list[str] | None = None) -> pa.Table:
    """The rows of a unit, or some of their columns; ``ArtifactError`` names a file that is missing or damaged."""
    filesystem, path = storage.arrow_filesystem(unit.uri)
    with explained(unit.place), pq.ParquetFile(path, filesystem=filesystem) as file:
        table = file.read_row_group(unit.row_group, columns=columns)
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise ArtifactError(f"{unit.uri} has no column {', '.join(missing)}; it has {', '.join(file.schema.names)}")
    return table


def split_attributes(unit: Unit, table: pa.Table, fields: Sequence[str], names: Sequence[str]) -> pa.Table:
    """``table`` with a column int32 [n] for each of ``fields`` (``attribute.colour``), -1 unknown.

    ``names`` are all attributes in the order of the column ``attributes``; one that does not hold a value for each
    raises ``ArtifactError``.
    """
    if not fields:
        return table
    if "attributes" not in table.column_names:
        raise ArtifactError(
            f"{unit.uri} has no column 'attributes', though its classes.json names {', '.join(names)}; {REMEDY}"
        )
    lists = table["attributes"].combine_chunks()
    sizes = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    if (sizes != len(names)).any():
        wrong = int(np.flatnonzero(sizes != len(names))[0])
        raise ArtifactError(
            f"{unit.place}: column 'attributes' holds {lists[wrong].as_py()} in row {wrong}, but "
            f"classes.json names {len(names)}: {', '.join(names)}; {REMEDY}"
        )
    values = pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(-1, len(names))
    for field in fields:
        column = np.ascontiguousarray(values[:, names.index(field.partition(".")[2])])
        table = table.append_column(field, pa.array(column, pa.int32()))
    return table


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what pyarrow and file systems raise into an ``ArtifactError`` about ``place``."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{place} is not there; {REMEDY}") from None
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{place} cannot be read: {first}; if the file is damaged, {REMEDY}") from error
