"""The work on one unit of vectors: read, check, join, write; and the search for ids that stand in several units.

Every file is written whole or not at all, under a name that depends on the unit alone; the summary comes last.
"""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import schemas, storage
from lookalike.data.intake.checks import Problems, check_vectors, read_ids
from lookalike.data.intake.files import Piece, VectorFile
from lookalike.data.intake.metadata import Metadata, carry
from lookalike.data.parts import part_name, read_table, write_table
from lookalike.data.sources.records import ADVICE
from lookalike.entries import escaped
from lookalike.sampling import stable_keys

BATCH_ROWS = 4096  # rows that are checked at a time; a row group
KEYS = np.dtype([("key", "<u8"), ("place", "<i8"), ("row", "<i8")])
"""Hash of an id, its place in the unit's part and its row in the file; sorted by key."""
Summary = dict[str, Any]
"""Number, file, rows, kept rows, refused rows, smallest and largest length of a vector."""


class Unit(NamedTuple):
    """Rows of a file that become one part."""

    number: int
    file: int
    start: int
    stop: int
    first_row: int
    """Number of row ``start``, counted over all files."""


class UnitRules(NamedTuple):
    """How units are checked and written."""

    dim: int
    dtype: str
    normalize: bool
    sources: dict[str, str]
    """Carried column -> column of the file; none if a table gives them."""


class UnitFiles:
    """Paths of a unit's results in the work folder of the draft."""

    def __init__(self, work: str) -> None:
        self.work = work

    def of(self, kind: str, unit: int, suffix: str = "parquet") -> str:
        """File of a unit of the ``kind`` ``parts``, ``keys``, ``quarantine``, ``repeated`` or ``summaries``."""
        return storage.join(self.work, kind, part_name(unit, suffix))

    def summary(self, unit: int) -> Summary | None:
        """Summary of a unit that is done."""
        uri = self.of("summaries", unit, "json")
        return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def write_unit(unit: Unit, file: VectorFile, metadata: Metadata | None, files: UnitFiles, rules: UnitRules) -> Summary:
    """Write the part, the keys and the quarantine of one unit, unless an earlier attempt did; return its summary."""
    if (done := files.summary(unit.number)) is not None:
        return done
    schema = schemas.embeddings(rules.dim, float16=rules.dtype == "float16")
    texts = [name for name in schema.names if name != "vector"]  # numbers gain nothing from a dictionary
    refused: list[pa.Table] = []
    keys: list[Any] = []
    kept, lengths = 0, [np.inf, 0.0]
    with (
        storage.open_atomic(files.of("parts", unit.number)) as target,
        pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=texts) as writer,
    ):
        row = unit.start
        for piece in file.pieces(unit.start, unit.stop, BATCH_ROWS):
            position = unit.first_row + row - unit.start
            table, good, problems, norms = check_piece(piece, file, metadata, position, rules)
            if table.num_rows:
                writer.write_table(table)
                lengths = [min(lengths[0], float(norms.min())), max(lengths[1], float(norms.max()))]
            refused.append(quarantine_rows(file.uri, row, table_ids=problems.ids, problems=problems.found))
            keys.append(_keys(table["image_id"].to_pylist(), kept, row + good))
            kept += table.num_rows
            row += len(piece.vectors)
    np_keys = np.sort(np.concatenate([*keys, np.empty(0, KEYS)]), order="key", kind="stable")
    _save(files.of("keys", unit.number, "npy"), np_keys)
    quarantine = pa.concat_tables([*refused, schemas.QUARANTINE.empty_table()])
    write_table(files.of("quarantine", unit.number), quarantine)
    summary = {"number": unit.number, "file": file.uri, "rows": unit.stop - unit.start, "kept": kept}
    summary |= {"refused": quarantine.num_rows, "lengths": lengths if kept else None}
    storage.write_atomic(files.of("summaries", unit.number, "json"), json.dumps(summary).encode())
    return summary


class Refused(NamedTuple):
    """Rows of a piece that cannot be taken, and the ids of all its rows, as far as they have one."""

    found: Problems
    ids: list[str]


def check_piece(
    piece: Piece, file: VectorFile, metadata: Metadata | None, position: int, rules: UnitRules
) -> tuple[pa.Table, Any, Refused, Any]:
    """(embeddings of the acceptable rows, their rows in the piece, the other rows, lengths of the acceptable vectors).

    ``position`` counts the piece's first row over all files: the id of a row that has no other.
    """
    num = len(piece.vectors)
    checked = check_vectors(piece.vectors, piece.unfit, rules.dtype, normalize=rules.normalize)
    problems = dict(checked.problems)
    ids = None
    if file.id_column is not None and piece.table is not None:
        ids, wrong = read_ids(piece.table[file.id_column])
        problems |= wrong
    columns = carry(piece.table, rules.sources, num)
    if metadata is not None:
        joined = metadata.of_ids(ids or []) if metadata.by_id else metadata.of_rows(position, num)
        columns |= joined.columns
        ids = joined.ids if joined.ids is not None else ids
        problems |= joined.problems
        lacking = ("image_id", "not_in_table", "the table has no row of this id; add one or leave the vector out")
        problems |= {row: lacking for row in joined.missing if row not in problems}
    if ids is None:
        ids = [str(number) for number in range(position, position + num)]
    good = np.setdiff1d(np.arange(num), np.fromiter(problems, np.int64, len(problems)))
    schema = schemas.embeddings(rules.dim, float16=rules.dtype == "float16")
    flat = pa.array(np.ascontiguousarray(checked.vectors[good]).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, rules.dim)
    rows = pa.array(good)
    table = pa.table(
        {
            "image_id": pa.array(ids, pa.string()).take(rows),
            "vector": vectors,
            **{name: column.take(rows) for name, column in columns.items()},
        }
    )
    return table.cast(schema), good, Refused(problems, ids), checked.norms[good]


def quarantine_rows(uri: str, first_row: int, *, table_ids: list[str], problems: Problems) -> pa.Table:
    """``QUARANTINE`` rows of the problems of a piece that begins with row ``first_row`` of its file."""
    rows = [
        {
            "image_id": escaped(table_ids[row]) or None,
            "source": escaped(uri),
            "row": first_row + row,
            "field": field,
            "reason": reason,
            "detail": escaped(detail),
        }
        for row, (field, reason, detail) in sorted(problems.items())
    ]
    return pa.Table.from_pylist(rows, schema=schemas.QUARANTINE)


def _keys(ids: list[str], first_place: int, rows: Any) -> Any:
    made = np.empty(len(ids), KEYS)
    made["key"], made["row"] = stable_keys(ids), rows
    made["place"] = np.arange(first_place, first_place + len(ids))
    return made


def _save(uri: str, array: Any) -> None:
    with storage.open_atomic(uri) as file:
        np.save(file, array)


class Repeated(NamedTuple):
    """A row whose id stands in an earlier row."""

    unit: int
    place: int
    """Row of the unit's part."""
    row: int
    """Row of the unit's file."""
    image_id: str
    earlier: tuple[int, int]
    """Unit and row of the first one."""


def find_repeated(units: Sequence[int], files: UnitFiles, rows_at_a_time: int) -> Iterator[Repeated]:
    """Rows whose id also stands before them, in the order of their hashes. Holds ``rows_at_a_time`` keys, about.

    The keys of every unit lie sorted, so a range of hashes is a slice of each, and every key is read once.
    """
    opened = {unit: _load_keys(files.of("keys", unit, "npy")) for unit in units}
    total = sum(len(keys) for keys in opened.values())
    bounds = np.linspace(0, 2.0**64, max(1, -(-total // rows_at_a_time)) + 1)[1:-1].astype(np.uint64)
    cuts = {unit: [0, *np.searchsorted(keys["key"], bounds).tolist(), len(keys)] for unit, keys in opened.items()}
    for slot in range(len(bounds) + 1):
        ids: dict[int, list[str]] = {}
        slices = [(unit, keys[cuts[unit][slot] : cuts[unit][slot + 1]]) for unit, keys in opened.items()]
        owners = np.concatenate([np.full(len(keys), unit) for unit, keys in slices])
        found = np.concatenate([keys for _, keys in slices])
        order = np.lexsort((found["place"], owners, found["key"]))
        owners, found = owners[order], found[order]
        same = found["key"][1:] == found["key"][:-1]
        firsts: dict[str, tuple[int, int]] = {}
        for at in np.flatnonzero(np.append(same, False) | np.insert(same, 0, False)).tolist():
            unit, place, row = int(owners[at]), int(found["place"][at]), int(found["row"][at])
            if unit not in ids:
                ids[unit] = read_table(files.of("parts", unit), ["image_id"])["image_id"].to_pylist()
            image_id = ids[unit][place]
            if image_id in firsts:
                yield Repeated(unit, place, row, image_id, firsts[image_id])
            else:
                firsts[image_id] = unit, row


def _load_keys(uri: str) -> Any:
    """The keys of a unit: memory-mapped from a disk, 24 bytes a row from elsewhere."""
    if storage.is_local(uri):
        return np.load(storage.local_path(uri), mmap_mode="r")
    return np.load(io.BytesIO(storage.read_bytes(uri)))


def publish_unit(unit: int, repeated: Sequence[Repeated], files: UnitFiles, target: str) -> int:
    """Give the artifact a unit's part without its repeated rows; return its rows."""
    source = files.of("parts", unit)
    filesystem, path = storage.arrow_filesystem(source)
    num_rows = int(pq.read_metadata(path, filesystem=filesystem).num_rows)
    drop = {again.place for again in repeated}
    if num_rows == len(drop):
        return 0
    storage.remove_file(target)
    if not drop:
        storage.share_file(source, target)
        return num_rows
    file, place = pq.ParquetFile(path, filesystem=filesystem), 0
    texts = [name for name in file.schema_arrow.names if name != "vector"]
    with (
        storage.open_atomic(target) as out,
        pq.ParquetWriter(out, file.schema_arrow, compression="zstd", use_dictionary=texts) as writer,
    ):
        for batch in file.iter_batches(BATCH_ROWS):
            keep = [row for row in range(batch.num_rows) if place + row not in drop]
            writer.write_batch(batch.take(pa.array(keep, pa.int64())))
            place += batch.num_rows
    return num_rows - len(drop)


def repeated_rows(repeated: Sequence[Repeated], source: str, first: dict[int, str]) -> pa.Table:
    """``QUARANTINE`` rows of repeated ids of the file ``source``; ``first``: unit -> file."""
    rows = [
        {
            "image_id": escaped(again.image_id),
            "source": escaped(source),
            "row": again.row,
            "field": "image_id",
            "reason": "duplicate",
            "detail": f"row {again.earlier[1]} of {escaped(first[again.earlier[0]])} has it; {ADVICE['duplicate']}",
        }
        for again in repeated
    ]
    return pa.Table.from_pylist(rows, schema=schemas.QUARANTINE)
