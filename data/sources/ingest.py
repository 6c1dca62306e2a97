"""One unit of the corpus: its records checked and written, its repeated ones taken out, its problems told.

No Ray here: each function is what a task does. All a task leaves is written whole or not at all, and under names that
depend on the unit alone, so it may be repeated after a crash; the summary is written last and marks the unit as done.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.parts import PartWriter, part_name, read_table, write_table
from lookalike.data.sources.image_fetch import fetch_images
from lookalike.data.sources.reader import BATCH_ROWS, Reader, Record, Unit
from lookalike.data.sources.records import RecordLimits, RecordOrigin, check_records
from lookalike.errors import CorpusError
from lookalike.schemas import CORPUS, QUARANTINE

IDS = pa.schema([("image_id", pa.string()), ("unit", pa.int64()), ("row", pa.int64()), ("split", pa.string())])
"""One row an accepted record: what the search for repeated ids needs of it."""
DROPPED = pa.schema([("unit", pa.int64()), ("split", pa.string()), ("rows", pa.int64())])
"""Records taken out of a unit."""
Summary = dict[str, Any]
"""Of a unit: number, file, records, accepted (split -> rows), quarantined rows, number of its part files."""


class UnitChecks(NamedTuple):
    """How a unit is checked and written."""

    limits: RecordLimits
    seed: int
    rows_per_file: int


class UnitFiles:
    """Where a unit's results lie: its parts in the artifact, the rest in the draft's private folder."""

    def __init__(self, out: str, work: str) -> None:
        self.out, self.work = out, work

    def part(self, unit: int, number: int) -> str:
        """A file of the corpus."""
        return storage.join(self.out, part_name(unit).replace(".", f"-{number:04d}."))

    def of(self, kind: str, unit: int, suffix: str = "parquet") -> str:
        """``summaries``, ``ids``, ``quarantine``, ``repeated`` of a unit."""
        return storage.join(self.work, kind, part_name(unit, suffix))

    def read(self, kind: str, unit: int, schema: pa.Schema) -> pa.Table:
        """One of those tables, empty when it was not written."""
        uri = self.of(kind, unit)
        return read_table(uri) if storage.exists(uri) else schema.empty_table()


def check_unit(number: int, unit: Unit, reader: Reader, places: UnitFiles, how: UnitChecks) -> Summary:
    """Read, check and write one unit, or return the summary that an earlier attempt left of it."""
    mark = places.of("summaries", number, "json")
    if storage.exists(mark):
        return dict(json.loads(storage.read_bytes(mark)))
    accepted: Counter[str] = Counter()
    row = quarantined = 0
    seen: set[str] = set()
    with (
        PartWriter(lambda place: places.part(number, place), CORPUS, how.rows_per_file) as parts,
        PartWriter(lambda _: places.of("ids", number), IDS) as ids,
        PartWriter(lambda _: places.of("quarantine", number), QUARANTINE) as refused,
    ):
        for records in _batches(reader, unit):
            fetch_images(records, reader.base, how.limits.max_bytes)
            origin = RecordOrigin(unit["uri"], row, reader.source, how.seed)
            checked = check_records(records, origin, limits=how.limits, seen=seen)
            parts.write(checked.accepted)
            ids.write(_ids(checked.accepted, number, checked.rows))
            refused.write(checked.quarantine)
            accepted.update(checked.accepted["split"].to_pylist())
            quarantined += checked.quarantine.num_rows
            row += len(records)
    summary = {
        "number": number,
        "file": unit["uri"],
        "records": row,
        "accepted": dict(accepted),
        "quarantined": quarantined,
        "parts": len(parts.uris),
    }
    storage.write_atomic(mark, json.dumps(summary).encode())
    return summary


def _batches(reader: Reader, unit: Unit) -> Iterator[list[Record]]:
    records = reader.read(unit)
    try:
        while batch := list(islice(records, BATCH_ROWS)):
            yield batch
    except (OSError, pa.ArrowException) as error:
        told = " ".join(str(error).split())
        raise CorpusError(
            f"{unit['uri']} cannot be read ({told}); replace or remove it, or run again if its store "
            "was out of reach: what is finished is kept"
        ) from None


def _ids(accepted: pa.Table, unit: int, rows: list[int]) -> pa.Table:
    units = pa.array([unit] * len(rows), pa.int64())
    return pa.table([accepted["image_id"], units, pa.array(rows, pa.int64()), accepted["split"]], schema=IDS)


def find_repeated(ids: pa.Table) -> pa.Table:
    """Of rows with the same id those that are not in the first unit that has it; within a unit ids differ."""
    frame = pl.DataFrame(ids.select(IDS.names))
    return frame.filter(pl.col("unit") > pl.col("unit").min().over("image_id")).to_arrow().cast(IDS)


def drop_repeated(repeated: pa.Table, places: UnitFiles) -> pa.Table:
    """Take some records of one unit out of its parts and note them for the quarantine; ``DROPPED``.

    May be repeated, and cut off at any point: it starts from the ids, which do not change.
    """
    repeated = repeated.sort_by("row")
    unit = repeated["unit"][0].as_py()
    summary: Summary = json.loads(storage.read_bytes(places.of("summaries", unit, "json")))
    rows = [
        {
            "image_id": entry["image_id"],
            "source": summary["file"],
            "row": entry["row"],
            "field": "image_id",
            "reason": "duplicate",
        }
        for entry in repeated.to_pylist()
    ]
    write_table(places.of("repeated", unit), pa.Table.from_pylist(rows, schema=QUARANTINE))
    for place in range(summary["parts"]):
        _drop_from_part(places.part(unit, place), repeated["image_id"].combine_chunks())
    splits = Counter(repeated["split"].to_pylist())
    return pa.Table.from_pylist(
        [{"unit": unit, "split": split, "rows": n} for split, n in splits.items()], schema=DROPPED
    )


def _drop_from_part(uri: str, image_ids: pa.Array) -> None:
    if not storage.exists(uri):  # all its rows were dropped before
        return
    dropped = pc.is_in(read_table(uri, ["image_id"])["image_id"], value_set=image_ids)
    if pc.all(dropped).as_py():
        storage.remove_file(uri)
    elif pc.any(dropped).as_py():
        write_table(uri, read_table(uri).filter(pc.invert(dropped)), row_group_size=BATCH_ROWS)


def problems_of_unit(unit: int, places: UnitFiles) -> pa.Table:
    """``QUARANTINE`` rows of a unit in record order, rows counted within it.

    Repairs of a record that was dropped as repeated are left out: a record is either refused, by one row, or accepted.
    """
    found, dropped = places.read("quarantine", unit, QUARANTINE), places.read("repeated", unit, QUARANTINE)
    kept = found.filter(pc.invert(pc.is_in(found["row"], value_set=dropped["row"].combine_chunks())))
    return pa.concat_tables([kept, dropped]).sort_by(
        [("row", "ascending"), ("field", "ascending"), ("reason", "ascending")]
    )
