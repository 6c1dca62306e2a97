"""Rows checked: which vectors and ids cannot be taken, and why; the others normalised."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.intake.files import Numbers
from lookalike.data.sources.records import ADVICE, MAX_ID_CHARS
from lookalike.data.sources.texts import read_text

_PLAIN = r"^[^\s\x00-\x1f\x7f-\x{9f}]([^\x00-\x1f\x7f-\x{9f}]*[^\s\x00-\x1f\x7f-\x{9f}])?$"
"""Ids that ``read_text`` leaves as they are; it sees to the others one by one."""
Problems = dict[int, tuple[str, str, str]]
"""Row of a piece -> (field, reason, detail)."""


class CheckedVectors(NamedTuple):
    """Vectors as they are stored."""

    vectors: npt.NDArray[Any]
    """[n, dim] of the stored dtype; rows with a problem hold zeros or what cannot be stored."""
    problems: Problems
    norms: npt.NDArray[np.float64]
    """Lengths before they were normalised, [n]."""


def check_vectors(
    numbers: Numbers, unfit: dict[int, tuple[str, str]], dtype: str, *, normalize: bool
) -> CheckedVectors:
    """Find vectors that are unfit, not finite (here or in ``dtype``) or of length 0; normalise if asked to."""
    problems: Problems = {row: ("vector", *why) for row, why in unfit.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        wide = numbers.astype(np.float64)
        peaks = np.abs(wide).max(axis=1, initial=0.0)
        scale = np.where(np.isfinite(peaks) & (peaks > 0), peaks, 1.0)  # squares of 1e200 would overflow
        wide /= scale[:, None]
        lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        if normalize:
            stored = (wide / np.where(lengths > 0, lengths, 1.0)[:, None]).astype(dtype)
        else:
            stored = numbers.astype(dtype)
        finite = np.isfinite(stored).all(axis=1)
    for row in np.flatnonzero(~finite).tolist():
        if row not in problems:
            problems[row] = ("vector", "not_finite", _not_finite(numbers[row], dtype))
    for row in np.flatnonzero(finite & ~stored.any(axis=1)).tolist():
        if row not in problems:
            why = "all its numbers are 0, so it has no direction; embed it again or leave the row out"
            problems[row] = ("vector", "zero", why)
    return CheckedVectors(stored, problems, lengths * scale)


def _not_finite(vector: Numbers, dtype: str) -> str:
    with np.errstate(over="ignore"):
        place = int(np.flatnonzero(~np.isfinite(vector.astype(dtype)))[0])
    value = vector[place]
    if np.isfinite(value):
        return f"number {place} is {value}, beyond {dtype}; set normalize=true, or scale the vectors"
    return f"number {place} is {value}, and all must be finite; embed it again or leave the row out"


def read_ids(column: pa.ChunkedArray) -> tuple[list[str], Problems]:
    """(ids as text, problems) of a column of ids; an id with a problem is empty."""
    plain = plain_texts(column, MAX_ID_CHARS)
    return _one_by_one(column.to_pylist()) if plain is None or plain.null_count else (plain.to_pylist(), {})


def plain_texts(column: pa.ChunkedArray, max_chars: int) -> pa.ChunkedArray | None:
    """A column as strings if all its values are whole numbers, plain texts or nulls; None if one needs a look."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    fits = pc.less_equal(pc.utf8_length(column), max_chars)
    plain = pc.all(pc.and_(pc.match_substring_regex(column, _PLAIN), fits)).as_py()
    return column.cast(pa.string()) if plain is not False else None


def _one_by_one(values: Sequence[Any]) -> tuple[list[str], Problems]:
    ids, problems = [], {}
    for row, value in enumerate(values):
        text, wrong = read_text(value, MAX_ID_CHARS)
        if wrong or not text:
            reason = min(wrong, default="null")
            problems[row] = ("image_id", reason, f"the id is {str(value)[:80]!r}: {ADVICE[reason]}")
        ids.append("" if wrong or text is None else text)
    return ids, problems
