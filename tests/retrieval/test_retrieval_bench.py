"""The retrieval bench: ratios are to the fastest exact product, whatever library it comes from."""

import numpy as np
import pytest

from lookalike.retrieval.vectors import normalise
from tests.benchmarks.retrieval import K, kernels, list_exact, summarise
from tests.synthetic import make_vectors


def test_exact_products_of_all_libraries_give_the_same_rows():
    vectors, _ = make_vectors(620, 32, num_classes=30, seed=9)
    unit, queries = normalise(vectors[:600]), vectors[600:]
    truth = np.argsort(-(queries.astype(np.float64) @ unit.T.astype(np.float64)), axis=1)[:, :K]
    cases = {case.name: case.search(queries) for case in list_exact(unit)}
    assert set(cases) == {"faiss exact", "numpy exact", "torch exact"}
    for rows in cases.values():
        np.testing.assert_array_equal(rows, truth)


def test_ratios_are_to_the_fastest_product_and_its_kernel_is_told():
    """faiss brings a BLAS that takes 25 ms on a processor that it does not know, where torch takes 6.3."""
    times = {"faiss exact": (25_000, 131_000), "numpy exact": (10_300, 90_000), "torch exact": (6_300, 95_000)}
    rows = {
        name: {"cpu_us": cpu, "p50_us": alone, "held_mb": 1638.0, "recall_at_10": 1.0}
        for name, (cpu, alone) in times.items()
    }
    rows["ours graph float16"] = {"cpu_us": 71.6, "p50_us": 150.0, "held_mb": 52.0, "recall_at_10": 0.992}
    found = summarise(rows)
    assert (found["exact_product"], found["exact_product_single"]) == ("torch exact", "numpy exact")
    assert found["ratios"]["qps_vs_exact"] == pytest.approx(88, abs=0.1)
    assert found["ratios"]["single_vs_exact"] == 600
    assert {"faiss", "torch"} < set(kernels())
