"""faiss's inner-product kernels over memory-mapped arrays, and the number of threads of a search.

A search uses one thread: a service answers many queries at once, and OpenMP's pools wait for each other by spinning,
which costs milliseconds per query once there are more runnable threads than cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np

from lookalike.retrieval.ranking import Floats, Rows

SEARCH_THREADS = 1


@contextmanager
def faiss_threads(num: int | None = None) -> Iterator[None]:
    """Set the faiss threads of the calling thread inside a block; default: those of a search."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(SEARCH_THREADS if num is None else num)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def inner_products_by_row(queries: Floats, block: Floats, rows: Rows) -> Floats:
    """float32 [n, k] with ``queries[i] . block[rows[i, j]]``; copies no row. Rows must be valid, arrays C-contiguous.

    Equal rows get equal products at any place, which a matrix product does not guarantee.
    """
    out = np.empty(rows.shape, np.float32)
    with faiss_threads():
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]  # faiss's stubs leave it out
            faiss.swig_ptr(out),
            faiss.swig_ptr(queries),
            faiss.swig_ptr(block),
            faiss.swig_ptr(rows),
            block.shape[1],
            *rows.shape,
        )
    return out
