"""From raw records to corpus rows: texts cleaned, images checked, every problem noted in the quarantine table.

A refused record adds one quarantine row, its first problem. A repaired field keeps its record and adds one row per
repair. Nothing is lost silently.
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

REPAIRED = "repaired: "  # prefix of the reasons of accepted records
MAX_ID_CHARS = 1024


class RecordLimits(NamedTuple):
    """Bounds of an acceptable image and of a text."""

    max_bytes: int
    max_pixels: int
    min_side_px: int
    max_text_chars: int


class RecordOrigin(NamedTuple):
    """Where a batch of records comes from."""

    file: str
    first_row: int
    """Number, in its unit, of the first record of the batch."""
    source: RecordSource
    seed: int


class CheckedRecords(NamedTuple):
    """The rows of a batch, and what was wrong with its records."""

    accepted: pa.Table
    """``CORPUS`` rows."""
    rows: list[int]
    """Number of each accepted record in its unit."""
    quarantine: pa.Table
    """``QUARANTINE`` rows."""


def check_records(
    records: Sequence[Record], origin: RecordOrigin, *, limits: RecordLimits, accepted_ids: set[str]
) -> CheckedRecords:
    """Check ``records`` and turn the acceptable ones into corpus rows.

    An image is given as bytes, or as the ``ImageError`` that fetching it raised. ``accepted_ids`` is extended: of
    acceptable records with the same id the first stays. Reasons of refusal: for the record, those of its reader; for
    the image id, ``null``, ``not_utf8``, ``wrong_type``, ``control_characters``, ``too_long`` and ``duplicate``; for
    the image, ``null``, ``wrong_type``, ``too_many_bytes``, ``too_small`` and those of ``images.decode`` and
    ``fetch_images``. Repairs: those of ``texts``, and a title that is ``empty``.
    """
    accepted: list[dict[str, Any]] = []
    rows: list[int] = []
    problems: list[dict[str, Any]] = []
    for number, record in enumerate(records, origin.first_row):
        row: dict[str, Any] = dict.fromkeys(CORPUS.names)
        reasons = _refuse(record, row, origin, limits, accepted_ids)
        if not reasons:
            reasons = _fill(record, row, origin, limits)
            accepted_ids.add(row["image_id"])
            accepted.append(row)
            rows.append(number)
        problems += [
            {"image_id": row["image_id"], "source": origin.file, "row": number, "field": field, "reason": reason}
            for field, reason in reasons
        ]
    return CheckedRecords(
        pa.Table.from_pylist(accepted, schema=CORPUS), rows, pa.Table.from_pylist(problems, schema=QUARANTINE)
    )


def _refuse(
    record: Record, row: dict[str, Any], origin: RecordOrigin, limits: RecordLimits, accepted_ids: set[str]
) -> list[tuple[str, str]]:
    """(field, reason) of the first problem that keeps a record out, else nothing; fills in id, image and its size."""
    if UNREADABLE in record:
        return [("record", record[UNREADABLE])]
    text, problems = read_text(record.get("image_id"), MAX_ID_CHARS)
    if problems:
        return [("image_id", min(problems))]
    if not text:
        return [("image_id", "null")]
    row["image_id"] = origin.source.id_prefix + text
    if row["image_id"] in accepted_ids:
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
    """Fill in everything but id and image; return (field, reason) of each repair."""
    source, most = origin.source, limits.max_text_chars
    repairs: dict[str, set[str]] = {}
    for field in TEXT:
        text, repairs[field] = read_text(record.get(field), most)
        row[field] = text or source.constants.get(field)
    if "title" in record and not row["title"]:
        row["title"] = ""
        repairs["title"] = repairs["title"] or {"empty"}
    row["keywords"], repairs["keywords"] = read_words(record.get("keywords"), most)
    for field, name in SCORED.items():
        row[field], repairs[field] = read_scored(record.get(field), most, name, 1.0 if name == "score" else None)
    gathered = {field.removeprefix(GATHERED): value for field, value in record.items() if field.startswith(GATHERED)}
    row["attributes"], repairs["attributes"] = read_attributes(record.get("attributes"), most, gathered)
    row["dataset"] = source.dataset
    if row["split"] is None:
        unit = row["group"] or row["image_id"]
        held_out = hash_unit(origin.seed, f"split/{source.dataset}/{unit}") < source.test_fraction
        row["split"] = "test" if held_out else "train"
    return [(field, REPAIRED + reason) for field, reasons in repairs.items() for reason in sorted(reasons)]


def count_reasons(quarantine: pa.Table) -> dict[str, int]:
    """``field: reason`` -> number of quarantine rows."""
    keys = pc.binary_join_element_wise(quarantine["field"], quarantine["reason"], ": ")
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(keys).to_pylist()}
