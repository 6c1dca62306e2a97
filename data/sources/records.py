"""From raw records to corpus rows: texts cleaned, images checked, every problem noted in the quarantine table.

A refused record adds one quarantine row, its first problem. A repaired field keeps its record and adds one row per
repair. Nothing is lost silently.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.sources.columns import GATHERED, SCORED, TEXT
from lookalike.data.sources.reader import DETAIL, UNREADABLE, Record, RecordSource
from lookalike.data.sources.texts import read_attributes, read_scored, read_text, read_words
from lookalike.entries import escaped
from lookalike.schemas import CORPUS, QUARANTINE
from lookalike.seeds import hash_unit
from lookalike.vision.decoder import Order, decode_apart
from lookalike.vision.images import ImageError

REPAIRED = "repaired: "  # prefix of the reasons of accepted records
MAX_ID_CHARS = 1024
MAX_DETAIL_CHARS = 500
ADVICE = {
    "null": "the record has none; fill it in, or map the column that holds it",
    "not_utf8": "its bytes are no UTF-8; rename it, or name the file's encoding, such as encoding: cp1252",
    "wrong_type": "its value is of a type that cannot hold it; convert it",
    "control_characters": "it contains control characters; remove them",
    "too_long": "it is longer than the limit; shorten it or raise the limit",
    "inexact_number": "it is a floating-point number that may stand for several whole numbers (a double from 2^53) or "
    "is infinite; write the column as integers or text",
    "duplicate": "a record before it has the same id; id_prefix keeps the ids of several sources apart",
    "too_many_bytes": "the image has more bytes than max_bytes",
    "too_small": "a side of the image is shorter than min_side_px",
    "white_space": "white space around it was removed",
    "bad_score": "a score was no number in [0, 1]",
    "bad_weight": "a weight was no number >= 0",
}
"""Reason -> detail, for problems that have no error message of their own."""


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
    the image id, ``null``, ``not_utf8``, ``wrong_type``, ``inexact_number``, ``control_characters``, ``too_long`` and
    ``duplicate``; for the image, ``null``, ``wrong_type``, ``too_many_bytes``, ``too_small`` and those of
    ``Decoder.run`` and ``fetch_images``. Repairs: those of ``texts``, an id in ``white_space``, and a title that is
    ``empty``.
    """
    accepted: list[dict[str, Any]] = []
    rows: list[int] = []
    problems: list[dict[str, Any]] = []
    for number, record in enumerate(records, origin.first_row):
        row: dict[str, Any] = dict.fromkeys(CORPUS.names)
        refusal = _refuse(record, row, origin, limits, accepted_ids)
        if refusal is not None:
            problems.append(_quarantine_row(record, row, origin, number, refusal))
            continue
        problems += [
            _quarantine_row(record, row, origin, number, repair) for repair in _fill(record, row, origin, limits)
        ]
        accepted_ids.add(row["image_id"])
        accepted.append(row)
        rows.append(number)
    return CheckedRecords(
        pa.Table.from_pylist(accepted, schema=CORPUS), rows, pa.Table.from_pylist(problems, schema=QUARANTINE)
    )


class Problem(NamedTuple):
    """Why a record was refused or repaired."""

    field: str
    reason: str
    detail: str | None


def _quarantine_row(
    record: Record, row: dict[str, Any], origin: RecordOrigin, number: int, problem: Problem
) -> dict[str, Any]:
    named = record.get("image_uri")
    return {
        "image_id": row["image_id"] or shown(record.get("image_id"), MAX_ID_CHARS),
        "source": escaped(origin.file),
        "row": number,
        "field": problem.field,
        "reason": problem.reason,
        "uri": shown(named, MAX_ID_CHARS),
        "detail": shown(problem.detail, MAX_DETAIL_CHARS),
    }


def shown(value: Any, most: int) -> str | None:
    """A raw value as text for the quarantine, at most ``most`` characters; None if there is none."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value[: 4 * most].decode("utf-8", "surrogateescape")
    return escaped(value if isinstance(value, str) else repr(value), most)


def _refuse(
    record: Record, row: dict[str, Any], origin: RecordOrigin, limits: RecordLimits, accepted_ids: set[str]
) -> Problem | None:
    """The first problem that keeps a record out, else None; fills in id, image and its size."""
    if UNREADABLE in record:
        return Problem("record", record[UNREADABLE], record.get(DETAIL))
    text, problems = read_text(record.get("image_id"), MAX_ID_CHARS)
    if problems or not text:
        reason = min(problems, default="null")
        return Problem("image_id", reason, ADVICE[reason])
    row["image_id"] = origin.source.id_prefix + text
    if row["image_id"] in accepted_ids:
        return Problem("image_id", "duplicate", ADVICE["duplicate"])
    return _refuse_image(record.get("image"), row, limits)


def _refuse_image(data: Any, row: dict[str, Any], limits: RecordLimits) -> Problem | None:
    reason, detail = None, None
    if data is None:
        reason = "null"
    elif isinstance(data, ImageError):
        reason, detail = data.reason, str(data)
    elif not isinstance(data, bytes):
        reason = "wrong_type"
    elif len(data) > limits.max_bytes:
        reason = "too_many_bytes"
    else:
        try:
            image = decode_apart(data, Order(limits.max_pixels))
        except ImageError as error:
            return Problem("image", error.reason, str(error))
        row["image"], row["width"], row["height"] = data, image.width, image.height
        reason = "too_small" if min(image.width, image.height) < limits.min_side_px else None
    return None if reason is None else Problem("image", reason, detail or ADVICE[reason])


def _fill(record: Record, row: dict[str, Any], origin: RecordOrigin, limits: RecordLimits) -> list[Problem]:
    """Fill in everything but id and image; return the repairs."""
    source, most = origin.source, limits.max_text_chars
    repairs: dict[str, set[str]] = {"image_id": _repairs_of_id(record["image_id"])}
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
    return [
        Problem(field, REPAIRED + reason, ADVICE.get(reason))
        for field, reasons in repairs.items()
        for reason in sorted(reasons)
    ]


def _repairs_of_id(value: Any) -> set[str]:
    padded = isinstance(value, (str, bytes)) and (value[:1].isspace() or value[-1:].isspace())
    return {"white_space"} if padded else set()


def count_reasons(quarantine: pa.Table) -> dict[str, int]:
    """``field: reason`` -> number of quarantine rows."""
    keys = pc.binary_join_element_wise(quarantine["field"], quarantine["reason"], ": ")
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(keys).to_pylist()}
