"""Small copies of the frozen embeddings, on which the label pipeline works.

A seeded Gaussian projection (Johnson-Lindenstrauss) keeps cosines within about 1/sqrt(dim). The cost of the
dictionary's classifiers and of the duplicate search then depends on the projected size, not on the backbone.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lookalike.seeds import derive_seed


def feature_schema(dim: int) -> pa.Schema:
    """Image id and projected vector."""
    vector = pa.field("vector", pa.list_(pa.float16(), dim))
    return pa.schema([pa.field("image_id", pa.string(), nullable=False), vector])


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """``vectors`` [n, d] scaled to length 1, in float32; a zero row stays zero."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12), dtype=np.float32)


@lru_cache(maxsize=4)
def _matrix(dim: int, out: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(derive_seed(seed, "projection", dim, out))
    return np.asarray(rng.standard_normal((dim, out)) / np.sqrt(out))


def project(vectors: NDArray[np.floating], out: int, seed: int) -> NDArray[np.float32]:
    """Unit rows [n, min(d, out)] of the normalised ``vectors`` [n, d], projected if d exceeds ``out``."""
    rows = unit_rows(vectors)
    if rows.shape[1] <= out:
        return rows
    matrix = _matrix(rows.shape[1], out, seed)
    return unit_rows(rows.astype(np.float64) @ matrix)  # in double, so that all batches round alike


def vectors_of(table: pa.Table, column: str = "vector") -> NDArray[Any]:
    """A fixed-size list column as an array [n, d], of the type in which it is stored."""
    values = table[column].combine_chunks()
    return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(-1, values.type.list_size)


def project_part(table: pa.Table, out: int, seed: int) -> pa.Table:
    """:func:`feature_schema` rows of a part of an embeddings artifact."""
    small = project(vectors_of(table), out, seed)
    flat = pa.array(small.astype(np.float16).reshape(-1), pa.float16())
    vectors = pa.FixedSizeListArray.from_arrays(flat, small.shape[1])
    return pa.table([table["image_id"].combine_chunks(), vectors], schema=feature_schema(small.shape[1]))
