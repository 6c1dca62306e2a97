"""What is right for a query: classes of a column, or judged pairs of a file; and which rows are alike."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.retrieval.relevance import Scores
from lookalike.sampling import stable_keys
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
Rows = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Judged pairs, each once."""

    queries: Rows
    """int64 [p]: place among the query rows."""
    items: Rows
    """int64 [p]: place among the database rows."""
    grades: Scores
    """float64 [p]."""


def classes_of(table: pa.Table, label: str, name: str) -> Rows:
    """The class of each row by the text of ``label``, int64 [n]; -1 for an empty one, which is no class."""
    if label not in table.column_names:
        valid = table.column_names
        raise UsageError(f"task label {label!r} is no column{nearest(label, valid)}; {name!r} has {', '.join(valid)}")
    names = ["" if value is None else str(value) for value in table[label].to_pylist()]
    classes = {text: i for i, text in enumerate(sorted(set(names) - {""}))}
    return np.array([classes.get(text, -1) for text in names], np.int64)


def row_keys(table: pa.Table, group: str | None) -> npt.NDArray[np.uint64]:
    """A key of each row, equal for rows of one value of ``group``; a row without a value has its own."""
    ids = table["image_id"].to_pylist()
    own = table[group].to_pylist() if group else [None] * len(ids)
    return stable_keys([f"group {value}" if value else f"row {id_}" for value, id_ in zip(own, ids, strict=True)])


def read_pairs(uri: str, table: pa.Table, queries: Rows, database: Rows) -> Pairs:
    """The pairs of a parquet file whose ids are among the rows ``queries`` and ``database`` of ``table``.

    Others are counted and logged, as are pairs of a row with itself. Raises ``UsageError`` for a file that is none of
    pairs, or if no pair is left.
    """
    found = _read(uri)
    ids = table["image_id"].combine_chunks()
    query = _places(found["query_id"], ids.take(pa.array(queries)))
    item = _places(found["item_id"], ids.take(pa.array(database)))
    known = (query >= 0) & (item >= 0)
    itself = np.zeros(len(known), bool)
    itself[known] = queries[query[known]] == database[item[known]]
    kept = known & ~itself
    if not kept.any():
        raise UsageError(
            f"no pair of {uri} names a query and an item of the database; check its ids, queries, database"
        )
    if not kept.all():
        lost = {"unknown_query": int((query < 0).sum()), "unknown_item": int(((query >= 0) & (item < 0)).sum())}
        log.warning("pairs left out %s", fields(uri=uri, pairs=len(kept), **lost, itself=int(itself.sum())))
    grades = found["grade"].to_numpy().astype(np.float64)
    return Pairs(query[kept], item[kept], grades[kept])


def _read(uri: str) -> pa.Table:
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except FileNotFoundError:
        raise UsageError(f"{uri} does not exist; give a parquet file of pairs") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{uri} is no parquet file ({str(error).splitlines()[0]}); give one of pairs") from None
    if missing := [name for name in ("query_id", "item_id") if name not in table.column_names]:
        raise UsageError(
            f"{uri} has no column {missing[0]!r}{nearest(missing[0], table.column_names)}; pairs have query_id, "
            f"item_id and perhaps grade, and it has {', '.join(table.column_names)}"
        )
    if "grade" not in table.column_names:
        table = table.append_column("grade", pa.array(np.ones(len(table))))
    kind = table.schema.field("grade").type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or table["grade"].null_count:
        raise UsageError(f"{uri} has grades of type {kind}, {table['grade'].null_count} of them null; give numbers")
    return table


def _places(wanted: pa.ChunkedArray, ids: pa.Array) -> Rows:
    found = pc.index_in(pc.cast(wanted, pa.string()), value_set=ids.cast(pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)
