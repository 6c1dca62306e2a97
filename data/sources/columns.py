"""Which column of a source holds which corpus field, and the raw values of Arrow columns."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.errors import CorpusError
from lookalike.registry import nearest

TEXT = ("title", "description", "category", "locale", "group", "view", "split", "creator", "licence")
SCORED = {"annotations": "score", "interactions": "weight"}
"""Fields that hold terms with a number -> the name of the number."""
LISTS = ("keywords", *SCORED, "attributes")
FIELDS = ("image_id", "image", "image_uri", *TEXT, *LISTS)
GATHERED = "attributes."
"""Prefix of a field that holds the values of one attribute: ``attributes.colour``."""
REQUIRED = (("image_id",), ("image", "image_uri"))
"""A record needs one field of each group."""

_NOT_UTF8 = b"\xff"  # replaces a nested value that contains invalid UTF-8
_BYTES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_SCALARS = (*_BYTES, pa.types.is_primitive, pa.types.is_decimal, pa.types.is_null)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)


Mapped = Mapping[str, str | None]
"""Corpus field -> column, as a recipe maps them; None: the field is not read, whatever columns the source has."""


def candidates(columns: Mapped, natural: Mapping[str, str]) -> dict[str, list[str]]:
    """Corpus field -> the columns that may hold it, best first."""
    unmapped = {field: [field, *filter(None, [natural.get(field)])] for field in FIELDS if field not in columns}
    return unmapped | {field: [] if column is None else [column] for field, column in columns.items()}


def resolve(
    columns: Mapped, present: list[str], where: str, natural: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Corpus field -> the one of the ``present`` columns that holds it; only fields that the source has.

    Raises ``CorpusError`` if a mapped column is absent or a required field has no column.
    """
    for field, column in columns.items():
        if column is not None and column not in present:
            raise CorpusError(
                f"{where}: column {column!r}, mapped to {field!r}, is absent"
                f"{nearest(column, list(present))}; the file has {_listed(present)}"
            )
    resolved = {
        field: next(name for name in names if name in present)
        for field, names in candidates(columns, natural or {}).items()
        if any(name in present for name in names)
    }
    for fields in REQUIRED:
        if not any(field in resolved for field in fields):
            wanted = " or ".join(repr(field) for field in fields)
            raise CorpusError(
                f"{where}: no column for the required field {wanted}; the file has {_listed(present)}"
                f"; name one under columns: {{{fields[0]}: <column>}}"
            )
    return resolved


def _listed(names: list[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def pick(record: Any, path: str) -> Any:
    """The value of a nested mapping at a dotted path, or None. A key that contains dots wins over a path."""
    if not isinstance(record, Mapping):
        return None
    if path in record:
        return record[path]
    head, _, rest = path.partition(".")
    return pick(record.get(head), rest) if rest else None


def pick_fields(record: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    """The corpus fields of a record without a schema; ``wanted`` as :func:`candidates` gives it."""
    values = {
        field: next((v for name in names if (v := pick(record, name)) is not None), None)
        for field, names in wanted.items()
    }
    return {field: value for field, value in values.items() if value is not None or field in record}


def paths_of_records(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The dotted paths that occur in ``records``, in order of appearance."""
    paths: dict[str, None] = {}

    def add(record: Mapping[str, Any], prefix: str) -> None:
        for key, value in record.items():
            paths[prefix + str(key)] = None
            if isinstance(value, Mapping) and prefix.count(".") < 8:
                add(value, f"{prefix}{key}.")

    for record in records:
        add(record, "")
    return list(paths)


def paths_of_schema(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The dotted paths of an Arrow schema and their types."""
    paths: dict[str, pa.DataType] = {}

    def add(fields: Iterable[pa.Field], prefix: str) -> None:
        for field in fields:
            paths.setdefault(prefix + field.name, field.type)
            if pa.types.is_struct(field.type):
                add(list(field.type), f"{prefix}{field.name}.")

    add(list(schema), "")
    return paths


def resolve_schema(
    columns: Mapped, schema: pa.Schema, where: str, natural: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Like :func:`resolve`, for an Arrow schema; also raises ``CorpusError`` if a type cannot hold its field."""
    paths = paths_of_schema(schema)
    resolved = resolve(columns, list(paths), where, natural)
    for field, column in resolved.items():
        if schema.names.count(column) > 1:
            raise CorpusError(f"{where}: there are several columns {column!r}, mapped to {field!r}; rename all but one")
        wanted = _wanted_type(field, paths[column])
        if wanted is not None:
            raise CorpusError(
                f"{where}: column {column!r} is {paths[column]}, the field {field!r} needs {wanted}; "
                "convert it or map another column"
            )
    return resolved


def _wanted_type(field: str, kind: pa.DataType) -> str | None:
    """None if ``kind`` can hold the field, else a description of the types that can."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if field == "image":
        named = pa.types.is_struct(kind) and {f.name for f in kind} & {"bytes", "path"}
        return None if _is(kind, _BYTES) or named else "binary, or a struct of bytes and path"
    if field in LISTS or field.startswith(GATHERED):
        return _wanted_list(field, kind)
    if field == "image_uri":
        return None if _is(kind, _BYTES) else "a string"
    return None if _is(kind, _SCALARS) else "a string"


def _wanted_list(field: str, kind: pa.DataType) -> str | None:
    listed = _is(kind, _LISTS)
    item = kind.value_type if listed else kind  # the items of a list that is empty in every row are nulls
    texts, struct = _is(item, (*_BYTES, pa.types.is_null)), pa.types.is_struct(item)
    if field == "keywords":
        fine, wanted = texts, "a list of strings"
    elif field in SCORED:
        fine = texts or struct or pa.types.is_map(kind)
        wanted = f"a list of structs (term, {SCORED[field]}), a map, or strings"
    elif field == "attributes":
        named = struct and (not listed or {"name", "value"} <= {part.name for part in item})
        fine = named or pa.types.is_map(kind) or (pa.types.is_null(item) if listed else texts)
        wanted = "a list of structs (name, value), a map, a struct, or JSON text"
    else:
        fine, wanted = _is(item, _SCALARS), "a string or a list of strings"
    return None if fine else wanted


def _is(kind: pa.DataType, tests: Iterable[Any]) -> bool:
    return any(test(kind) for test in tests)


def arrow_records(table: pa.Table, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a table as records; ``columns``: the result of :func:`resolve_schema`."""
    values = {field: raw_values(_leaf(table, path), field in SCORED) for field, path in columns.items()}
    for index in range(table.num_rows):
        yield {field: cells[index] for field, cells in values.items()}


def top_level(schema: pa.Schema, paths: list[str]) -> list[str]:
    """The top-level columns that hold the dotted ``paths``."""
    return sorted({path if path in schema.names else path.partition(".")[0] for path in paths})


def _leaf(table: pa.Table, path: str) -> Any:
    if path in table.column_names:
        return table.column(path)
    head, *rest = path.split(".")
    return pc.struct_field(table.column(head), rest)


def raw_values(column: Any, scored: bool = False) -> list[Any]:
    """Python values of a column, strings as bytes, because invalid UTF-8 must not raise an error here.

    Small floats stay numpy's, whose texts are short (0.1); in a column of ``scored`` terms this does not matter.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if _is(kind, _LISTS) and _is(kind.value_type, _BYTES):
        return list(column.cast(pa.large_list(pa.large_binary())).to_pylist())
    if pa.types.is_nested(kind):
        values = [_nested_value(value) for value in column]
        return [_with_floats(value, kind) for value in values] if not scored and _has_floats(kind) else values
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return [_with_floats(value, kind) for value in column.to_pylist()]
    if not _is(kind, _BYTES):
        column = column.cast(pa.string())
    return list(column.cast(pa.large_binary()).to_pylist())


def _nested_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return _NOT_UTF8


_FLOATS = {pa.float16(): np.float16, pa.float32(): np.float32}


def _has_floats(kind: pa.DataType) -> bool:
    return kind in _FLOATS or any(_has_floats(kind.field(place).type) for place in range(kind.num_fields))


def _with_floats(value: Any, kind: pa.DataType) -> Any:
    """``value`` with the floats that pyarrow widened to doubles narrowed again."""
    if value is None or value == _NOT_UTF8:
        return value
    if kind in _FLOATS:
        return _FLOATS[kind](value)
    if pa.types.is_struct(kind):
        return {part.name: _with_floats(value[part.name], part.type) for part in kind}
    if pa.types.is_map(kind):
        return [(key, _with_floats(item, kind.item_type)) for key, item in value]
    return [_with_floats(item, kind.value_type) for item in value] if _is(kind, _LISTS) else value
