"""Vectors as arrays: queries checked, rows scaled to unit length, int8 codes, float16 read fast."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike import arguments
from lookalike.errors import UsageError
from lookalike.retrieval.ranking import Floats


def check_queries(queries: npt.ArrayLike, dim: int) -> Floats:
    """``queries`` as contiguous float32 [n, dim]; a single vector counts as n = 1.

    Raises ``ArgumentError`` for what is no array of numbers, ``UsageError`` for another size, numbers that are not
    finite, or a vector of zeros.
    """
    if isinstance(queries, np.ndarray) and queries.dtype == np.float32 and not hasattr(queries, "mask"):
        array: Floats = queries
    else:
        array = arguments.to_float32("queries", arguments.check_array("queries", queries))
    if array.ndim != 2 or not array.flags.c_contiguous:
        array = np.ascontiguousarray(np.atleast_2d(array))
    if array.ndim != 2 or array.shape[1] != dim:
        raise UsageError(f"query of shape {np.shape(queries)}: this index takes vectors of {dim} numbers")
    if len(array) == 1:  # the fast way: a single query notices every microsecond
        if 0 < np.dot(array[0], array[0]) < np.inf:
            return array
    elif (squares := np.einsum("nd,nd->n", array, array)).min(initial=np.inf) > 0 and squares.max(initial=0) < np.inf:
        return array
    if not np.isfinite(array).all():
        raise UsageError("the query vector holds NaN or infinity; send finite numbers")
    if (norms := np.linalg.norm(array, axis=1)).size and not norms.min() > 0:
        raise UsageError("the query vector is all zeros and has no direction; send another")
    return array


def normalise(vectors: Floats) -> Floats:
    """Rows scaled to unit length, float32; rows of zeros stay zeros."""
    return vectors * inverse_norms(np.linalg.norm(vectors, axis=1).astype(np.float32))[:, None]


def inverse_norms(norms: Floats) -> Floats:
    """1 / norm, and 0 where the norm is 0: such a prefix has no direction, and its cosine counts as 0."""
    return np.divide(np.float32(1), norms, out=np.zeros_like(norms), where=norms > 0)


def quantise(vectors: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 codes [n, d] from -127 to 127 and their scales float32 [n]: value ~ code * scale."""
    largest = np.abs(vectors).max(axis=1, initial=0).astype(np.float32)
    scales = largest / np.float32(127)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors * inverse[:, None]).astype(np.int8), scales


def to_float32(array: npt.NDArray[Any]) -> Floats:
    """``array`` as float32; float16 goes through a table of all 65,536 values, twice as fast as numpy's cast."""
    if array.dtype == np.float16:
        return _HALVES.take(np.ascontiguousarray(array).view(np.uint16))
    return np.asarray(array, dtype=np.float32)


_HALVES: Floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def row_slices(num_rows: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` rows."""
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
