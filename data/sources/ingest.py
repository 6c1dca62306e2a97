"""The work on one unit of the corpus: check and write its records, remove repeated ones, collect its problems.

Each function is the body of a Ray task. Every file is written whole or not at all, under a name that depends on the
unit alone, so a task may run again after a crash; the summary is written last and marks the unit as done.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.parts import PartWriter, part_name, read_table, write_table
from lookalike.data.sources.image_fetch import BATCH_BYTES, fetch_images
from lookalike.data.sources.reader import BATCH_ROWS, PASSED_OVER, Reader, Record, Unit
from lookalike.data.sources.records import ADVICE, RecordLimits, RecordOrigin, check_records
from lookalike.entries import escaped
from lookalike.errors import CorpusError
from lookalike.sampling import stable_keys
from lookalike.schemas import CORPUS, QUARANTINE

IDS = pa.schema([("image_id", pa.string()), ("unit", pa.int64()), ("row", pa.int64()), ("split", pa.string())])
"""One row per accepted record, for the search for repeated ids."""
REMOVED = pa.schema([("unit", pa.int64()), ("split", pa.string()), ("rows", pa.int64())])
"""Records removed from a unit."""
Summary = dict[str, Any]
"""Number and file of a unit, its records, accepted rows by split, quarantined rows, number of part files, and the files
that it passed over."""


class UnitChecks(NamedTuple):
    """How a unit is checked and written."""

    limits: RecordLimits
    seed: int
    rows_per_file: int


class UnitFiles:
    """Paths of a unit's results: its parts in the artifact, the rest in the work folder of the draft."""

    def __init__(self, out: str, work: str) -> None:
        self.out, self.work = out, work

    def part(self, unit: int, number: int) -> str:
        """Part file ``number`` of a unit, in the corpus."""
        return storage.join(self.out, part_name(unit).replace(".", f"-{number:04d}."))

    def of(self, kind: str, unit: int, suffix: str = "parquet") -> str:
        """File of a unit of the ``kind`` ``summaries``, ``ids``, ``names``, ``quarantine`` or ``repeated``."""
        return storage.join(self.work, kind, part_name(unit, suffix))

    def read(self, kind: str, unit: int, schema: pa.Schema) -> pa.Table:
        """Table of a unit of a ``kind``; empty if it was not written."""
        uri = self.of(kind, unit)
        return read_table(uri) if storage.exists(uri) else schema.empty_table()


def check_unit(number: int, unit: Unit, reader: Reader, files: UnitFiles, checks: UnitChecks) -> Summary:
    """Read, check and write one unit, unless an earlier attempt did; return its summary."""
    mark = files.of("summaries", number, "json")
    if storage.exists(mark):
        return dict(json.loads(storage.read_bytes(mark)))
    accepted: Counter[str] = Counter()
    row = quarantined = 0
    accepted_ids: set[str] = set()
    names: list[str] = []
    has_table = reader.has_table()
    with (
        PartWriter(lambda place: files.part(number, place), CORPUS, checks.rows_per_file) as parts,
        PartWriter(lambda _: files.of("ids", number), IDS) as ids,
        PartWriter(lambda _: files.of("quarantine", number), QUARANTINE) as refused,
    ):
        for records in _batches(reader, unit, checks.limits.max_bytes):
            if has_table:
                named = [uri for record in records if (uri := record.get("image_uri")) is not None]
                names += [clean_path(uri, reader.base) for uri in named]
            origin = RecordOrigin(unit["uri"], row, reader.source, checks.seed)
            checked = check_records(records, origin, limits=checks.limits, accepted_ids=accepted_ids)
            parts.write(checked.accepted)
            ids.write(_ids(checked.accepted, number, checked.rows))
            refused.write(checked.quarantine)
            accepted.update(checked.accepted["split"].to_pylist())
            quarantined += checked.quarantine.num_rows
            row += len(records)
    if names:
        write_table(files.of("names", number), pa.table({"key": stable_keys(names)}))
    passed_over = unit.get(PASSED_OVER) or dict(reader.passed_over) or None
    counts = {"records": row, "accepted": dict(accepted), "quarantined": quarantined, "parts": len(parts.uris)}
    summary = {"number": number, "file": unit["uri"], PASSED_OVER: passed_over, **counts}
    storage.write_atomic(mark, json.dumps(summary).encode())
    return summary


def clean_path(uri: Any, base: str) -> str:
    """A path below ``base`` as listings of that folder have it, escaped."""
    text = uri.decode("utf-8", "surrogateescape") if isinstance(uri, bytes) else str(uri)
    return escaped(
        "/".join(part for part in text.strip().removeprefix(f"{base.rstrip('/')}/").split("/") if part != ".")
    )


def keys_of_names(unit: int, files: UnitFiles) -> npt.NDArray[np.uint64]:
    """Keys of the file names that the records of a unit give, if it has a table that names files."""
    uri = files.of("names", unit)
    return np.asarray(read_table(uri)["key"]) if storage.exists(uri) else np.empty(0, np.uint64)


def _batches(reader: Reader, unit: Unit, max_bytes: int) -> Iterator[list[Record]]:
    """Records with their images: up to ``BATCH_ROWS``, fewer where their images are large."""
    records = reader.records(unit)
    try:
        while batch := list(take_records(records)):
            while batch:
                fetched = fetch_images(batch, reader.base, max_bytes, reader.source.fetch)
                yield batch[:fetched]
                batch = batch[fetched:]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"{unit['uri']} cannot be read ({reason}); replace or remove it, or run again if its store "
            "was out of reach: what is finished is kept"
        ) from None


def take_records(records: Iterator[Record]) -> Iterator[Record]:
    """The next ``BATCH_ROWS`` records; no more once they hold ``BATCH_BYTES``."""
    size = 0
    for record in islice(records, BATCH_ROWS):
        yield record
        size += sum(map(_size, record.values()))
        if size >= BATCH_BYTES:
            return


def _size(value: Any) -> int:
    """About how many bytes a raw value has; of a list or mapping, about what its entries take."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return 64 * len(value) if isinstance(value, (list, tuple)) else 0


def _ids(accepted: pa.Table, unit: int, rows: list[int]) -> pa.Table:
    units = pa.array([unit] * len(rows), pa.int64())
    return pa.table([accepted["image_id"], units, pa.array(rows, pa.int64()), accepted["split"]], schema=IDS)


def find_repeated(ids: pa.Table) -> pa.Table:
    """The rows whose id also occurs in an earlier unit; within a unit ids differ."""
    frame = pl.DataFrame(ids.select(IDS.names))
    return frame.filter(pl.col("unit") > pl.col("unit").min().over("image_id")).to_arrow().cast(IDS)


def drop_repeated(repeated: pa.Table, files: UnitFiles) -> pa.Table:
    """Remove records of one unit from its parts and note them for the quarantine; return ``REMOVED``.

    It may be interrupted at any point and run again: it starts from the ids, which do not change.
    """
    repeated = repeated.sort_by("row")
    unit = repeated["unit"][0].as_py()
    summary: Summary = json.loads(storage.read_bytes(files.of("summaries", unit, "json")))
    problem = {
        "source": escaped(summary["file"]),
        "field": "image_id",
        "reason": "duplicate",
        "detail": ADVICE["duplicate"],
    }
    rows = [{**entry, **problem} for entry in repeated.to_pylist()]
    write_table(files.of("repeated", unit), pa.Table.from_pylist(rows, schema=QUARANTINE))
    for place in range(summary["parts"]):
        _drop_from_part(files.part(unit, place), repeated["image_id"].combine_chunks())
    splits = Counter(repeated["split"].to_pylist())
    removed = [{"unit": unit, "split": split, "rows": n} for split, n in splits.items()]
    return pa.Table.from_pylist(removed, schema=REMOVED)


def _drop_from_part(uri: str, image_ids: pa.Array) -> None:
    if not storage.exists(uri):  # an earlier attempt removed all of its rows
        return
    repeated = pc.is_in(read_table(uri, ["image_id"])["image_id"], value_set=image_ids)
    if pc.all(repeated).as_py():
        storage.remove_file(uri)
    elif pc.any(repeated).as_py():
        write_table(uri, read_table(uri).filter(pc.invert(repeated)), row_group_size=BATCH_ROWS)


def problems_of_unit(unit: int, files: UnitFiles) -> pa.Table:
    """``QUARANTINE`` rows of a unit in record order; row numbers count within the unit.

    Repairs of a record that was removed as repeated are left out: a record is either accepted, or refused by one row.
    """
    problems, removed = (files.read(kind, unit, QUARANTINE) for kind in ("quarantine", "repeated"))
    others = problems.filter(pc.invert(pc.is_in(problems["row"], value_set=removed["row"].combine_chunks())))
    return pa.concat_tables([others, removed]).sort_by([(name, "ascending") for name in ("row", "field", "reason")])
