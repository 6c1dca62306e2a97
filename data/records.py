"""Raw records to corpus rows: columns mapped, text repaired, images checked; each problem is a quarantine row.

Pure functions on Arrow tables. A refused record leaves the corpus, a repaired field keeps it; both leave one row each
in the quarantine table, so that nothing is lost silently.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lookalike.errors import CorpusError
from lookalike.registry import nearest
from lookalike.schemas import CORPUS, QUARANTINE
from lookalike.seeds import hash_unit
from lookalike.vision.images import ImageError, decode

REQUIRED = ("image_id", "image")
TEXT = ("title", "description", "category", "locale", "group", "view", "split", "creator", "licence")
FIELDS = (*REQUIRED, *TEXT, "keywords")


class Limits(NamedTuple):
    """What an acceptable image may measure."""

    max_bytes: int
    max_pixels: int
    min_side_px: int


class Origin(NamedTuple):
    """Where a table of records comes from and what its source is called."""

    source: str
    first_row: int
    """Row of the table's first record in its file."""
    first_order: int
    """Number of the table's first record in the whole corpus."""
    dataset: str
    test_fraction: float
    seed: int


class Checked(NamedTuple):
    """Rows in ``CORPUS`` and in ``QUARANTINE``."""

    accepted: pa.Table
    quarantine: pa.Table


def resolve_columns(columns: Mapping[str, str], schema: pa.Schema, where: str) -> dict[str, str]:
    """Corpus field -> source column for all fields the source has; the names are the same unless ``columns`` differs.

    Raises ``CorpusError`` for an unknown field, a mapped column that is absent, a required field without a column and
    a column of a type that cannot hold the field.
    """
    present = list(schema.names)
    for field, column in columns.items():
        if field not in FIELDS:
            raise CorpusError(f"{where}: columns maps {field!r}, which is no corpus field{nearest(field, list(FIELDS))}"
                              f"; fields: {', '.join(FIELDS)}")  # fmt: skip
        if column not in present:
            raise CorpusError(f"{where}: column {column!r}, mapped to {field!r}, is absent{nearest(column, present)}; "
                              f"the file has {', '.join(present)}")  # fmt: skip
    resolved = {field: columns.get(field, field) for field in FIELDS if columns.get(field, field) in present}
    for field in REQUIRED:
        if field not in resolved:
            raise CorpusError(f"{where}: no column for the required field {field!r}; the file has {', '.join(present)}"
                              f"; name one under columns: {{{field}: <column>}}")  # fmt: skip
    for field, column in resolved.items():
        _check_type(field, column, schema.field(column).type, where)
    return resolved


def _check_type(field: str, column: str, kind: pa.DataType, where: str) -> None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if field == "image":
        fine, wanted = _is_bytes(kind), "binary"
    elif field == "keywords":
        fine, wanted = _is_bytes(kind) or (listed and _is_bytes(kind.value_type)), "a list of strings"
    else:
        fine, wanted = _is_bytes(kind) or pa.types.is_primitive(kind), "a string"
    if not (fine or pa.types.is_null(kind)):
        raise CorpusError(f"{where}: column {column!r} is {kind}, the field {field!r} needs {wanted}; convert it or "
                          "map another column")  # fmt: skip


def _is_bytes(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                       pa.types.is_large_binary, pa.types.is_string_view,
                                       pa.types.is_binary_view))  # fmt: skip


def raw_values(column: Any) -> list[Any]:
    """Python values of a column, strings as the bytes they are: invalid UTF-8 must not raise here."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return list(column.cast(pa.large_list(pa.large_binary())).to_pylist())
    if not _is_bytes(kind):
        column = column.cast(pa.string())
    return list(column.cast(pa.large_binary()).to_pylist())


def read_ids(column: Any) -> list[str | None]:
    """The ids of a column, None where there is none or it is not UTF-8."""
    return [_decode(value)[0] or None for value in raw_values(column)]


def _decode(value: bytes | None) -> tuple[str | None, bool]:
    if value is None:
        return None, True
    try:
        return value.decode().strip(), True
    except UnicodeDecodeError:
        return None, False


def check_records(
    table: pa.Table, columns: Mapping[str, str], origin: Origin, *, limits: Limits, repeated: Mapping[str, int]
) -> Checked:
    """Corpus rows of ``table`` and what is wrong with the others.

    ``columns`` comes from :func:`resolve_columns`; ``repeated`` maps an id that several records have to the number of
    the first of them, which stays. Reasons of refusal: ``null``, ``not_utf8``, ``duplicate`` (image_id), and for the
    image ``null``, ``too_many_bytes``, ``too_small`` and those of ``vision.images.decode``. A
    title that is empty or not UTF-8 becomes the empty string with reason ``repaired: ...``; other text turns to null.
    """
    values = {field: raw_values(table.column(column)) for field, column in columns.items()}
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    for index in range(table.num_rows):
        record = {field: cells[index] for field, cells in values.items()}
        number = origin.first_row + index
        row, found = _check_record(record, origin, limits, repeated, origin.first_order + index)
        problems += [{"image_id": row["image_id"], "source": origin.source, "row": number, "field": field,
                      "reason": reason} for field, reason in found]  # fmt: skip
        if all(reason.startswith("repaired") for _, reason in found):
            rows.append(row)
    return Checked(pa.Table.from_pylist(rows, schema=CORPUS), pa.Table.from_pylist(problems, schema=QUARANTINE))


def _check_record(
    record: Mapping[str, Any], origin: Origin, limits: Limits, repeated: Mapping[str, int], order: int
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    row: dict[str, Any] = dict.fromkeys(CORPUS.names)
    row["image_id"], valid = _decode(record["image_id"])
    problems: list[tuple[str, str]] = []
    if not row["image_id"]:
        problems.append(("image_id", "null" if valid else "not_utf8"))
    elif repeated.get(row["image_id"], order) != order:
        problems.append(("image_id", "duplicate"))
    if not problems:  # an image is decoded only for a record that could be kept
        problems += _check_image(record["image"], row, limits)
    problems += _fill_text(record, row)
    row["dataset"] = origin.dataset
    if row["split"] is None:
        unit = row["group"] or row["image_id"] or ""
        held_out = hash_unit(origin.seed, f"split/{origin.dataset}/{unit}") < origin.test_fraction
        row["split"] = "test" if held_out else "train"
    return row, problems


def _check_image(data: bytes | None, row: dict[str, Any], limits: Limits) -> list[tuple[str, str]]:
    if data is None:
        return [("image", "null")]
    if len(data) > limits.max_bytes:
        return [("image", "too_many_bytes")]
    try:
        image = decode(data, max_pixels=limits.max_pixels)
    except ImageError as error:
        return [("image", error.reason)]
    row["image"], (row["width"], row["height"]) = data, image.size
    return [("image", "too_small")] if min(image.size) < limits.min_side_px else []


def _fill_text(record: Mapping[str, Any], row: dict[str, Any]) -> list[tuple[str, str]]:
    problems = []
    for field in TEXT:
        if field in record:
            text, valid = _decode(record[field])
            row[field] = text or None
            if not valid:
                problems.append((field, "repaired: not_utf8"))
    if "title" in record and not row["title"]:
        row["title"] = ""
        if not problems or problems[0][0] != "title":
            problems.append(("title", "repaired: empty"))
    row["keywords"], valid = _keywords(record.get("keywords"))
    if not valid:
        problems.append(("keywords", "repaired: not_utf8"))
    return problems


def _keywords(value: bytes | list[bytes | None] | None) -> tuple[list[str], bool]:
    items = value.split(b",") if isinstance(value, bytes) else value or []
    decoded = [_decode(item) for item in items]
    return [text for text, _ in decoded if text], all(valid for _, valid in decoded)


def count_reasons(quarantine: pa.Table) -> dict[str, int]:
    """``field: reason`` -> rows."""
    keys = pc.binary_join_element_wise(quarantine["field"], quarantine["reason"], ": ")
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(keys).to_pylist()}
