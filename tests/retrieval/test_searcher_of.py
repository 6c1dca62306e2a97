"""``Searcher.of``: search over an array in memory, against plain numpy."""

import numpy as np
import pytest

from lookalike import Plan, Searcher
from lookalike.errors import ArgumentError, UsageError
from tests.synthetic import make_vectors

DIMS = (16, 64, 128)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_vectors(2000, 128)[0]


def nearest(rows: np.ndarray, queries: np.ndarray, k: int, dim: int = 128) -> np.ndarray:
    unit = [part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in (queries, rows)]
    return np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :k]


def test_the_answer_is_that_of_a_product_and_its_rows_are_the_arrays(rows: np.ndarray) -> None:
    queries = rows[:20] + 0.1 * make_vectors(20, 128)[0]
    hits = Searcher.of(rows).search(queries, 7)
    assert np.array_equal(hits.rows, nearest(rows, queries, 7))
    cosines = (queries @ rows[hits.rows[:, 0]].T).diagonal() / np.linalg.norm(queries, axis=1)
    assert np.allclose(hits.scores[:, 0], cosines / np.linalg.norm(rows[hits.rows[:, 0]], axis=1), atol=1e-6)


def test_ids_in_any_order_and_columns_are_kept(rows: np.ndarray) -> None:
    ids = [f"sku-{n}" for n in np.random.default_rng(3).permutation(len(rows))]
    views = ["icon" if n % 3 else None for n in range(len(rows))]
    searcher = Searcher.of(rows.tolist(), ids, {"view": views})
    hits = searcher.search(rows[5], 3, allowed={"view": "icon"})
    assert searcher.ids(hits.rows) == [ids[row] for row in hits.rows[0]]
    assert (hits.rows[0] % 3 > 0).all()
    assert searcher.metadata([3, 4]) == [{"image_id": ids[3]}, {"image_id": ids[4], "view": "icon"}]
    assert searcher.find([ids[77], "none", ids[0]]).tolist() == [77, -1, 0]
    assert np.allclose(searcher.vectors([77])[0], rows[77] / np.linalg.norm(rows[77]), atol=1e-6)


@pytest.mark.parametrize("shortlist", ["graph", "flat", "hnsw"])
def test_plans_use_its_shortlists(rows: np.ndarray, shortlist: str) -> None:
    searcher = Searcher.of(rows, dims=DIMS, shortlist=shortlist)
    plan = Plan(shortlist_dim=16, shortlist_k=400, stages=((64, 100),), rerank_dim=128)
    found, exact = searcher.search(rows[:50], 10, plan).rows, nearest(rows, rows[:50], 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]) > 0.9
    with pytest.raises(UsageError, match=r"plan dims \[32\] are not nested dims of the index"):
        searcher.search(rows[0], 1, Plan(shortlist_dim=32, rerank_dim=128))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vectors": np.full((2, 3), np.nan)}, r"vectors\[0\] holds NaN or infinity, or is all zeros, as 2 of 2 rows"),
        ({"vectors": [[1, 2], [0, 0]]}, r"vectors\[1\] holds NaN or infinity, or is all zeros, as 1 of 2"),
        ({"vectors": [1.0, 2.0]}, r"vectors have shape \[2\]; give one or more rows of equal size, \[n, D\]"),
        ({"vectors": np.ones((0, 4))}, r"vectors have shape \[0, 4\]"),
        ({"vectors": [["a", "b"]]}, "vectors"),
        ({"ids": ["a"]}, "image_id: 1 values for 2 vectors; give one each"),
        ({"ids": ["a", "a"]}, "the id 'a' stands twice; ids are unique"),
        ({"ids": [1, 2]}, r"ids\[0\] is 1"),
        ({"columns": {"view": "icon"}}, "view: 'icon' for 2 vectors; give one each"),
        ({"columns": {"price": [1.5, 2.0]}}, "price holds 1.5; give texts"),
        ({"columns": {"image_id": ["a", "b"]}}, "the column 'image_id' holds the ids"),
        ({"dims": [4]}, r"dims \[4\] exceed the vectors' 2; drop 4"),
        ({"shortlist": "grapf"}, "unknown shortlist 'grapf'.*graph"),
        ({"metadata": {}}, "Searcher.of has no argument 'metadata'"),
    ],
)
def test_what_is_wrong_is_named(given: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Searcher.of(**{"vectors": [[1.0, 2.0], [2.0, 1.0]], **given})


def test_a_wrong_type_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError):
        Searcher.of("vectors.npy")  # type: ignore[arg-type]
