"""Text fields of corpus records as flat arrays: which record says which distinct text, and how strongly."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike.data.text.languages import readable

Integers = NDArray[np.int64]
Scores = NDArray[np.float64]

MAX_ENTRIES = 1000
"""Entries read of a list."""


class Entries(NamedTuple):
    """Entry i of a field: record ``row[i]`` says text ``text[i]`` with ``strength[i]`` in [0, 1]."""

    row: Integers
    text: Integers
    strength: Scores


class Fields:
    """The named fields of ``records`` with their distinct ``texts``, each cut at ``max_characters``.

    ``category`` gives the parts of its path; a column that is absent has no entries.
    """

    def __init__(self, records: pa.Table, names: Sequence[str], max_characters: int) -> None:
        self.texts: list[str] = []
        self._entries: dict[str, Entries] = {}
        for name in names:
            row, values, strength = _flatten(records, name)
            cut = pc.utf8_slice_codeunits(values, 0, max_characters).dictionary_encode()
            code = cut.indices.to_numpy(zero_copy_only=False).astype(np.int64) + len(self.texts)
            self.texts += cut.dictionary.to_pylist()
            self._entries[name] = Entries(row, code, strength)
        self._locales = _encode(records, "locale")

    def __getitem__(self, name: str) -> Entries:
        return self._entries[name]

    def in_language(self, name: str, language: str | None) -> Entries:
        """The entries of a field that may be read as ``language``."""
        entries = self._entries[name]
        if language is None or not len(entries.row):
            return entries
        used, text = np.unique(entries.text, return_inverse=True)
        locales, code = self._locales
        may = readable([self.texts[at] for at in used.tolist()], text, locales, code[entries.row], language)
        return Entries(entries.row[may], entries.text[may], entries.strength[may])


def _encode(records: pa.Table, name: str) -> tuple[list[str | None], Integers]:
    if name not in records.column_names:
        return [None], np.zeros(records.num_rows, np.int64)
    encoded = _one_chunk(records[name]).dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _one_chunk(column: Any) -> Any:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _flatten(records: pa.Table, name: str) -> tuple[Integers, Any, Scores]:
    """(record, text, strength) of every entry that is not null."""
    if name not in records.column_names or pa.types.is_null(records.schema.field(name).type):
        return np.zeros(0, np.int64), pa.array([], pa.string()), np.zeros(0)
    column = _one_chunk(records[name])
    if name == "interactions":
        return flatten_scored(column, "weight")
    if name == "category":
        column = pc.split_pattern(column, "/")
    row = np.arange(len(column))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = _first_entries(column)
        row, column = _parents(column), pc.list_flatten(column)
    valid = column.is_valid()
    row = row[valid.to_numpy(zero_copy_only=False)]
    return row, column.filter(valid).cast(pa.string()), np.ones(len(row))


def _first_entries(column: Any) -> Any:
    if (pc.max(pc.list_value_length(column)).as_py() or 0) <= MAX_ENTRIES:
        return column
    return pc.list_slice(column, 0, MAX_ENTRIES, return_fixed_size_list=False)


def _parents(column: Any) -> Integers:
    return np.asarray(pc.list_parent_indices(column).to_numpy(zero_copy_only=False), dtype=np.int64)


def flatten_scored(column: Any, score: str) -> tuple[Integers, Any, Scores]:
    """(record, term, score cut to [0, 1]) of a list of structs; entries without a term or a score are left out."""
    column = _first_entries(_one_chunk(column))
    row, entries = _parents(column), pc.list_flatten(column)
    terms = pc.struct_field(entries, "term").cast(pa.string())
    scores = pc.struct_field(entries, score).cast(pa.float64())
    valid = pc.and_kleene(terms.is_valid(), pc.fill_null(pc.is_finite(scores), False))
    keep = valid.to_numpy(zero_copy_only=False)
    found = scores.fill_null(0.0).to_numpy(zero_copy_only=False)[keep]
    return row[keep], terms.filter(valid), np.clip(found, 0.0, 1.0)
