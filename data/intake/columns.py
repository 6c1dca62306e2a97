"""Columns of Arrow tables as vectors: lists, fixed-size lists, tensors."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.intake.files import ID_NAMES, Numbers, Piece, Where, check_dtype
from lookalike.entries import escaped
from lookalike.errors import UsageError
from lookalike.registry import nearest


def _storage(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold vectors."""
    kind = _storage(kind)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def find_columns(schema: pa.Schema, where: Where, uri: str) -> tuple[str, str | None]:
    """(column of the vectors, column of the ids or None) of a table; raises ``UsageError`` if they are not plain."""
    for name, wanted in (("vector_column", where.vector_column), ("id_column", where.id_column)):
        if wanted is not None and wanted not in schema.names:
            has = ", ".join(escaped(column) for column in schema.names)
            raise UsageError(
                f"{escaped(uri)} has no column {wanted!r}{nearest(wanted, schema.names)}; set {name} to one of: {has}"
            )
    vector = where.vector_column or _only_list(schema, uri)
    if not is_list(schema.field(vector).type):
        raise UsageError(
            f"{escaped(uri)}: column {vector!r} is {schema.field(vector).type}, and vectors are lists of numbers; "
            "set vector_column to another, or write it as a list"
        )
    ids = where.id_column or next((name for name in ID_NAMES if name in schema.names), None)
    return vector, ids


def _only_list(schema: pa.Schema, uri: str) -> str:
    lists = [field.name for field in schema if is_list(field.type)]
    if len(lists) != 1:
        told = f"several columns of lists ({', '.join(lists)})" if lists else "no column with lists of numbers"
        kinds = ", ".join(f"{escaped(field.name)} {field.type}" for field in schema)
        raise UsageError(f"{escaped(uri)} has {told}; set vector_column to one of its columns: {kinds}")
    return str(lists[0])


def list_size(kind: pa.DataType) -> int | None:
    """Numbers in each list of a fixed-size column; None if lists differ."""
    kind = _storage(kind)
    return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else None


def check_list(kind: pa.DataType, uri: str, *, integers: bool) -> None:
    """Raise ``UsageError`` unless a column of this type holds vectors: 1-d tensors, numbers as ``check_dtype``."""
    if isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) != 1:
        raise UsageError(
            f"{escaped(uri)} holds tensors of shape {list(kind.shape)}, and a vector has one axis; flatten it"
        )
    check_dtype(np.dtype(_storage(kind).value_type.to_pandas_dtype()), uri, integers=integers)


def read_piece(table: pa.Table, vector: str, dim: int) -> Piece:
    """The rows of a table as vectors of ``dim`` numbers; other sizes, nulls and nulls inside are unfit."""
    column = table[vector].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1 else column
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    rest = table.drop_columns([vector])
    sizes = pc.list_value_length(column)
    good = pc.fill_null(pc.equal(sizes, dim), False).to_numpy(zero_copy_only=False)
    unfit = {int(row): _unfit(sizes[int(row)].as_py(), dim) for row in np.flatnonzero(~good)}
    kept = column if good.all() else column.filter(pa.array(good))
    numbers = pc.list_flatten(kept)
    flat = numbers.to_numpy(zero_copy_only=False)
    vectors: Numbers = np.zeros((len(table), dim), flat.dtype) if unfit else flat.reshape(-1, dim)
    if unfit:
        vectors[good] = flat.reshape(-1, dim)
    if numbers.null_count:
        rows = np.flatnonzero(good)[np.flatnonzero(numbers.is_null().to_numpy(zero_copy_only=False)) // dim]
        unfit |= {int(row): ("null", "a number of it is null; fill it in or leave the row out") for row in rows}
        vectors = vectors.copy()
        vectors[rows] = 0
    return Piece(vectors, unfit, rest if rest.num_columns else None)


def _unfit(size: Any, dim: int) -> tuple[str, str]:
    if size is None:
        return "null", "it has no vector; fill it in or leave the row out"
    return "wrong_size", f"it has {size} numbers, the others have {dim}; embed it with the same model"
