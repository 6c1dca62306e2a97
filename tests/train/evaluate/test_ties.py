"""Ranks do not depend on the order of rows, on blocks or on the processor, and ties fall by ``image_id``."""

import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pyarrow as pa
import pytest

from lookalike.train.evaluate import evaluate
from lookalike.train.evaluate.baselines import grid_prefix, normalize_prefix
from lookalike.train.evaluate.evaluate import EmbeddingTable, EvaluateConfig, RetrievalTask, measure, nearest_rows

TASK = RetrievalTask(queries={"view": ["front"]}, database={"view": ["icon"]}, label="group")
CONFIG = EvaluateConfig(tasks={"product": TASK}, dims=(4, 8), svd_of=["v"], svd_fit={"view": ["icon"]}, random_of=["v"])


def crowded(num: int = 120, dim: int = 16) -> np.ndarray:
    """Vectors in four crowds that differ by a few units of the last place: full ties, and ties within rounding."""
    rng = np.random.default_rng(3)
    crowds = np.repeat(rng.normal(size=(4, dim)), num // 4, axis=0)
    return (crowds * (1 + rng.integers(-2, 3, (num, dim)) * 6e-8)).astype(np.float32)


def embedded(vectors: np.ndarray, order: np.ndarray) -> EmbeddingTable:
    num = len(vectors)
    columns = {
        "image_id": [f"i{i * 7919 % 1009:04d}" for i in range(num)],
        "group": [f"g{i // 3 % 6}" for i in range(num)],
        "view": ["front" if i % 3 == 0 else "icon" for i in range(num)],
    }
    return EmbeddingTable("v", vectors[order], pa.table(columns).take(pa.array(order)), (vectors.shape[1],))


@pytest.mark.parametrize("vectors", [crowded(), np.ones((120, 16), np.float32)], ids=["near ties", "all equal"])
def test_figures_are_the_same_for_any_order_of_rows_and_any_block(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = measure(embedded(vectors, np.arange(120)), CONFIG)
    for seed, blocks in ((1, (512, 65_536)), (2, (1, 7)), (3, (50, 1))):
        monkeypatch.setattr(evaluate, "QUERY_BLOCK", blocks[0])
        monkeypatch.setattr(evaluate, "BASE_BLOCK", blocks[1])
        assert measure(embedded(vectors, np.random.default_rng(seed).permutation(120)), CONFIG) == wanted


def test_of_equal_vectors_the_smallest_ids_are_found() -> None:
    table = embedded(np.ones((120, 16), np.float32), np.arange(120)).table.to_pylist()
    icons = sorted((row["image_id"], row["group"]) for row in table if row["view"] == "icon")
    asked = [row["group"] for row in table if row["view"] == "front"]
    figures = measure(embedded(np.ones((120, 16), np.float32), np.arange(120)), CONFIG)[0]
    assert figures["p_at_1"] == np.mean([group == icons[0][1] for group in asked])


def test_ranks_are_those_of_whole_numbers() -> None:
    """The oracle adds products of Python's integers."""
    grid = grid_prefix(crowded(), 16)
    np.testing.assert_allclose(grid / 2.0**24, normalize_prefix(crowded(), 16), atol=2.0**-23)
    whole = [[int(value) for value in row] for row in grid]
    found = nearest_rows(grid[:20], grid[20:], np.full(20, -1), 10)
    for query, rows in zip(whole[:20], found.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in whole[20:]]
        assert rows == sorted(range(100), key=lambda row: (-scores[row], row))[:10]


SCRIPT = """
import numpy as np
from lookalike.train.evaluate.baselines import REDUCTIONS, grid_prefix
from lookalike.train.evaluate.evaluate import nearest_rows
from tests.train.evaluate.test_ties import crowded, spread
for vectors in (crowded(), REDUCTIONS["svd"](spread(), spread()[:200], 0)):
    grid = grid_prefix(vectors, 12)
    print(nearest_rows(grid[:40], grid[40:], np.full(40, -1), 10).tobytes().hex())
"""


def spread() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(300, 24)).astype(np.float32)


def test_another_processors_kernels_give_the_same_ranks() -> None:
    """OpenBLAS as for a processor of 2004, numpy without vector instructions, beside those of this machine."""
    old = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX AVX2 FMA3"}
    with redirect_stdout(StringIO()) as here:
        exec(SCRIPT, {})
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | old, capture_output=True, text=True, check=True
    )
    assert other.stdout == here.getvalue() != ""


def test_an_empty_label_is_no_class() -> None:
    data = embedded(crowded(), np.arange(120))
    groups = ["" if i % 4 == 0 else group for i, group in enumerate(data.table["group"].to_pylist())]
    nulls = [group or None for group in groups]
    place = data.table.column_names.index("group")
    empty, null = (
        EmbeddingTable("v", data.vectors, data.table.set_column(place, "group", pa.array(column)), data.dims)
        for column in (groups, nulls)
    )
    assert measure(empty, CONFIG) == measure(null, CONFIG)
