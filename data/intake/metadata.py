"""The table of ids and columns beside the vectors: read once, kept as a memory-mapped Arrow file, joined by row or id.

``carry`` is the one place that decides which columns an embeddings artifact takes, and as which types.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from lookalike import storage
from lookalike.config import Config
from lookalike.data.intake.checks import plain_texts, read_ids
from lookalike.data.intake.files import ID_NAMES
from lookalike.data.intake.tables import TABLES
from lookalike.data.intake.text_tables import TEXT_TABLES
from lookalike.data.sources.texts import read_text
from lookalike.entries import escaped
from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.sampling import stable_keys
from lookalike.schemas import CARRIED

READ_ROWS = 8192
MAX_TEXT_CHARS = 10_000  # of a value, as in a corpus
ID = "image_id"


class TableConfig(Config):
    """A table with a row for each vector."""

    uri: str
    """A parquet, Arrow, CSV, TSV or JSON lines file, or a Lance data set."""
    id_column: str | None = None
    """Column of its ids; None: the first of image_id, id, _id, ids, key and pk that it has, if any."""
    join: Literal["auto", "row", "id"] = "auto"
    """By ``row``: row n describes vector n, counted over all files. By ``id``: the rows of equal ids belong together.
    ``auto``: by id if both vectors and table have ids, else by row."""


def check_columns(mapping: Mapping[str, str | None]) -> None:
    """Raise ``UsageError`` for a column that embeddings do not carry."""
    for name in mapping:
        if name not in CARRIED:
            raise UsageError(
                f"columns names {name!r}{nearest(name, list(CARRIED))}; embeddings carry {', '.join(CARRIED)}"
            )


def sources_of(names: list[str], mapping: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Carried column -> column of a table with ``names``: as mapped, else the one of that name; null takes none."""
    found = {}
    for name in CARRIED:
        source = mapping.get(name, name)
        if source is None or (source not in names and name not in mapping):
            continue
        if source not in names:
            has = ", ".join(escaped(column) for column in names)
            raise UsageError(f"{where} has no column {source!r}{nearest(source, list(names))}; it has {has}")
        found[name] = source
    return found


def carry(table: pa.Table | None, sources: Mapping[str, str], num_rows: int) -> dict[str, pa.Array]:
    """The carried columns of ``num_rows`` rows as strings; null where the table has none."""
    carried = {}
    for name in CARRIED:
        if table is None or name not in sources:
            carried[name] = pa.nulls(num_rows, pa.string())
            continue
        column = table[sources[name]]
        if (plain := plain_texts(column, MAX_TEXT_CHARS)) is None:
            values = [read_text(value, MAX_TEXT_CHARS)[0] or None for value in column.to_pylist()]
            plain = pa.chunked_array([pa.array(values, pa.string())])
        carried[name] = pa.concat_arrays([*plain.chunks, pa.array([], pa.string())])
    return carried


class Joined(NamedTuple):
    """The columns of some vectors."""

    ids: list[str] | None
    """Ids of the table, if it is joined by row and has some."""
    columns: dict[str, pa.Array]
    missing: list[int]
    """Rows whose id the table lacks."""
    problems: dict[int, tuple[str, str, str]]


class Metadata:
    """A table that was read with ``read_table``: its rows by number, or by id.

    Holds 16 bytes per row for a join by id; the rest is memory-mapped.
    """

    def __init__(self, path: str, *, by_id: bool) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(path)).read_all()
        self.num_rows, self.has_ids, self.by_id = self._table.num_rows, ID in self._table.column_names, by_id
        if by_id:
            keys = np.concatenate([_keys(chunk) for chunk in self._table[ID].chunks] or [np.empty(0, np.uint64)])
            self._order = np.argsort(keys, kind="stable")
            self._keys = keys[self._order]

    def repeated(self) -> tuple[str, int, int] | None:
        """(id, row, later row) of an id that the table holds twice."""
        for place in np.flatnonzero(self._keys[1:] == self._keys[:-1]).tolist():
            first, second = (int(self._order[place + step]) for step in (0, 1))
            ids = self._table[ID].take(pa.array([first, second])).to_pylist()
            if ids[0] and ids[0] == ids[1]:
                return ids[0], first, second
        return None

    def of_rows(self, start: int, num: int) -> Joined:
        """The rows ``start`` to ``start + num``."""
        table = self._table.slice(start, num)
        ids, problems = read_ids(table[ID]) if self.has_ids else (None, {})
        return Joined(ids, _columns(table), [], problems)

    def of_ids(self, ids: list[str]) -> Joined:
        """The rows of these ids."""
        keys = stable_keys(ids)
        places = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        if not len(self._keys):
            return Joined(None, carry(None, {}, len(ids)), list(range(len(ids))), {})
        rows = self._order[places]
        table = self._table.take(pa.array(rows))
        missing = [row for row, (own, found) in enumerate(zip(ids, table[ID].to_pylist(), strict=True)) if own != found]
        return Joined(None, _columns(table), missing, {})


def _keys(chunk: pa.Array) -> Any:
    return stable_keys([value or "" for value in chunk.to_pylist()])


def _columns(table: pa.Table) -> dict[str, pa.Array]:
    return {name: pa.concat_arrays([*table[name].chunks, pa.array([], pa.string())]) for name in CARRIED}


def read_table(config: TableConfig, mapping: Mapping[str, str | None], path: str) -> None:
    """Write the carried columns of a table, and its ids, to a local Arrow file at ``path``; never all in memory."""
    with storage.open_atomic(path) as file:
        writer = None
        for table, sources, ids in _read(config, mapping):
            columns: dict[str, Any] = {} if ids is None else {ID: _id_texts(table[ids])}
            made = pa.table(columns | carry(table, sources, len(table)))
            if writer is None:
                writer = pa.ipc.new_file(file, made.schema)
            writer.write_table(made)
        if writer is None:
            raise UsageError(f"the table {escaped(config.uri)} has no rows; give one with a row for each vector")
        writer.close()


def _id_texts(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([text or None for text in read_ids(column)[0]], pa.string())


def find_id_column(names: list[str], wanted: str | None, where: str) -> str | None:
    """The column of ids of a table with ``names``."""
    if wanted is not None and wanted not in names:
        has = ", ".join(escaped(name) for name in names)
        raise UsageError(
            f"{where} has no column {wanted!r}{nearest(wanted, list(names))}; set id_column to one of: {has}"
        )
    return wanted or next((name for name in ID_NAMES if name in names), None)


def _read(
    config: TableConfig, mapping: Mapping[str, str | None]
) -> Iterator[tuple[pa.Table, dict[str, str], str | None]]:
    """(rows, carried column -> their column, column of their ids) until the table ends."""
    uri, where = storage.absolute(config.uri), f"the table {escaped(config.uri)}"
    ending = uri.rstrip("/").rpartition(".")[2].lower()
    if ending not in TABLES and ending not in TEXT_TABLES:
        known = ", ".join(sorted([*TABLES, *TEXT_TABLES]))
        raise UsageError(f"{where}: tables are read from files that end in {known}; convert it")
    if not storage.exists(uri):
        raise UsageError(f"{where} is not there; give the path of a file")
    opened = TEXT_TABLES.get(ending)(uri) if ending in TEXT_TABLES else TABLES.get(ending)(uri)
    names = opened.schema.names
    sources, ids = sources_of(names, mapping, where), find_id_column(names, config.id_column, where)
    wanted = dict.fromkeys([*sources.values(), *([] if ids is None else [ids])])
    if not wanted:
        has = ", ".join(escaped(name) for name in names)
        raise UsageError(f"{where} has neither ids nor a column of {', '.join(CARRIED)}; set columns, from: {has}")
    for table in opened.read(0, opened.num_rows, READ_ROWS, list(wanted)):
        yield table, sources, ids
