"""Raw records to corpus rows: text cleaned, images checked; each problem is a quarantine row.

Pure functions. A refused record leaves the corpus and leaves one row, its first problem, in the quarantine table; a
repaired field keeps its record and leaves one row a repair. Nothing is lost silently.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.sources.columns import GATHERED, SCORED, TEXT
from lookalike.data.sources.reader import UNREADABLE, Record, RecordSource
from lookalike.data.sources.texts import read_attributes, read_scored, read_text, read_words
from lookalike.schemas import CORPUS, QUARANTINE
from lookalike.seeds import hash_unit
from lookalike.vision.images import ImageError, decode

REPAIRED = "repaired: "  # how the reasons of rows begin whose record was accepted
MAX_ID_CHARS = 1024


class RecordLimits(NamedTuple):
    """What an acceptable image may measure, and how long a text may be."""

    max_bytes: int
    max_pixels: int
    min_side_px: int
    max_text_chars: int


class RecordOrigin(NamedTuple):
    """Where some records come from."""

    file: str
    first_row: int
    """Number of the first of them in its unit."""
    source: RecordSource
    seed: int


class CheckedRecords(NamedTuple):
    """Rows in ``CORPUS``, and in ``QUARANTINE``; row numbers of the former."""

    accepted: pa.Table
    rows: list[int]
    quarantine: pa.Table


def check_records(
    records: Sequence[Record], origin: RecordOrigin, *, limits: RecordLimits, seen: set[str]
) -> CheckedRecords:
    """Corpus rows of ``records`` and what is wrong with the others.

    An image is bytes, or the ``ImageError`` met in fetching it. ``seen`` holds the ids accepted before and is extended:
    of acceptable records with the same id the first stays. Reasons of refusal: of the record what its reader says; of
    the image id ``null``, ``not_utf8``, ``wrong_type``, ``control_characters``, ``too_long`` and ``duplicate``; of the
    image ``null``, ``wrong_type``, ``too_many_bytes``, ``too_small`` and those of ``images.decode`` and
    ``fetch_images``. Repairs: those of ``sources.texts``, and a title that is there but ``empty``.
    """
    accepted: list[dict[str, Any]] = []
    rows: list[int] = []
    problems: list[dict[str, Any]] = []
    for number, record in enumerate(records, origin.first_row):
        row: dict[str, Any] = dict.fromkeys(CORPUS.names)
        found = _refuse(record, row, origin, limits, seen)
        if not found:
            found = _fill(record, row, origin, limits)
            seen.add(row["image_id"])
            accepted.append(row)
            rows.append(number)
        problems += [
            {"image_id": row["image_id"], "source": origin.file, "row": number, "field": field, "reason": reason}
            for field, reason in found
        ]
    return CheckedRecords(
        pa.Table.from_pylist(accepted, schema=CORPUS), rows, pa.Table.from_pylist(problems, schema=QUARANTINE)
    )


def _refuse(
    record: Record, row: dict[str, Any], origin: RecordOrigin, limits: RecordLimits, seen: set[str]
) -> list[tuple[str, str]]:
    """The first problem that keeps a record out, as a list of at most one; fills in id, image and its size."""
    if UNREADABLE in record:
        return [("record", record[UNREADABLE])]
    text, found = read_text(record.get("image_id"), MAX_ID_CHARS)
    if found:
        return [("image_id", sorted(found)[0])]
    if not text:
        return [("image_id", "null")]
    row["image_id"] = origin.source.id_prefix + text
    if row["image_id"] in seen:
        return [("image_id", "duplicate")]
    reason = _refuse_image(record.get("image"), row, limits)
    return [] if reason is None else [("image", reason)]


def _refuse_image(data: Any, row: dict[str, Any], limits: RecordLimits) -> str | None:
    if data is None:
        return "null"
    if isinstance(data, ImageError):
        return data.reason
    if not isinstance(data, bytes):
        return "wrong_type"
    if len(data) > limits.max_bytes:
        return "too_many_bytes"
    try:
        image = decode(data, max_pixels=limits.max_pixels)
    except ImageError as error:
        return error.reason
    row["image"], (row["width"], row["height"]) = data, image.size
    return "too_small" if min(image.size) < limits.min_side_px else None


def _fill(record: Record, row: dict[str, Any], origin: RecordOrigin, limits: RecordLimits) -> list[tuple[str, str]]:
    """Fill in everything but id and image; the repairs."""
    source, most = origin.source, limits.max_text_chars
    found: dict[str, set[str]] = {}
    for field in TEXT:
        text, found[field] = read_text(record.get(field), most)
        row[field] = text or source.constants.get(field)
    if "title" in record and not row["title"]:
        row["title"] = ""
        found["title"] = found["title"] or {"empty"}
    row["keywords"], found["keywords"] = read_words(record.get("keywords"), most)
    for field, name in SCORED.items():
        row[field], found[field] = read_scored(record.get(field), most, name, 1.0 if name == "score" else None)
    gathered = {field.removeprefix(GATHERED): value for field, value in record.items() if field.startswith(GATHERED)}
    row["attributes"], found["attributes"] = read_attributes(record.get("attributes"), most, gathered)
    row["dataset"] = source.dataset
    if row["split"] is None:
        unit = row["group"] or row["image_id"]
        held_out = hash_unit(origin.seed, f"split/{source.dataset}/{unit}") < source.test_fraction
        row["split"] = "test" if held_out else "train"
    return [(field, REPAIRED + reason) for field, reasons in found.items() for reason in sorted(reasons)]


def count_reasons(quarantine: pa.Table) -> dict[str, int]:
    """``field: reason`` -> rows."""
    keys = pc.binary_join_element_wise(quarantine["field"], quarantine["reason"], ": ")
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(keys).to_pylist()}
