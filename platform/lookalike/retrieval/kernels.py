"""faiss's inner-product kernels over memory-mapped arrays, and how many threads a search uses.

One thread: a service answers many queries at once, and OpenMP's pools wait for each other by spinning,
which costs milliseconds a query as soon as there are more runnable threads than cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np

from lookalike.retrieval.ranking import Floats, Rows

SEARCH_THREADS = 1


@contextmanager
def faiss_threads(num: int | None = None) -> Iterator[None]:
    """faiss threads of the calling thread for the time of a block; those of a search by default."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(SEARCH_THREADS if num is None else num)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def inner_products_by_row(queries: Floats, block: Floats, rows: Rows) -> Floats:
    """float32 [n, k]: ``queries[i] . block[rows[i, j]]``, no row copied. Rows must be valid, arrays C-contiguous.

    Equal rows get equal products wherever they stand, which a matrix product does not promise.
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
