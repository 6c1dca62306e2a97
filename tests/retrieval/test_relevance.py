"""What counts as right, against loops over dictionaries and sets."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.errors import UsageError
from lookalike.retrieval.relevance import ByClass, ByPairs, encode_rows


def test_rows_are_equal_where_all_columns_are() -> None:
    table = pa.table({"a": ["x", "y", "x", "x", None, ""], "b": [1, 1, 2, 1, 1, 1]})
    codes = encode_rows(table, ["a", "b"]).tolist()
    assert codes[0] == codes[3]
    assert len({codes[0], codes[1], codes[2]}) == 3
    assert codes[4:] == [-1, -1]
    assert len(set(encode_rows(table, ["b"]).tolist())) == 2


def test_values_that_only_look_alike_when_joined_are_different() -> None:
    codes = encode_rows(pa.table({"a": ["x", "xy"], "b": ["yz", "z"]}), ["a", "b"])
    assert codes[0] != codes[1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 12))
def test_lists_by_class_are_judged_as_loops_judge_them(seed: int, depth: int) -> None:
    random = np.random.default_rng(seed)
    asked, database = random.integers(-1, 4, 9), random.integers(-1, 4, 12)
    mine, others = random.integers(-1, 3, 9), random.integers(-1, 3, 12)
    rows = np.stack([random.permutation(np.append(np.arange(12), [-1] * 4))[:depth] for _ in asked])
    relevance = ByClass(asked, database, (mine, others))
    judged = relevance.judge(rows[3:], 3)
    for i in range(9):
        right = {r for r in range(12) if asked[i] >= 0 and database[r] == asked[i]}
        kept = {r for r in right if mine[i] < 0 or others[r] != mine[i]}
        assert relevance.num_relevant[i] == len(kept)
        if i >= 3:
            assert judged.hits[i - 3].tolist() == [row in right for row in rows[i]]
            assert judged.ideal[i - 3].sum() == min(depth, len(kept))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), min_grade=st.sampled_from([0, 1, 2]))
def test_lists_by_pairs_are_judged_as_loops_judge_them(seed: int, min_grade: int) -> None:
    random = np.random.default_rng(seed)
    known = {(int(q), int(r)): float(g) for q, r, g in random.integers(0, [7, 12, 4], (25, 3))}
    again = [*known, *list(known)[:5]]  # a pair may be said twice
    queries, items = np.array(again).T
    pairs = ByPairs(queries, items, np.array([known[pair] for pair in again]), num_queries=7, min_grade=min_grade)
    rows = np.stack([random.permutation(np.append(np.arange(12), [-1, -1])) for _ in range(7)])
    judged = pairs.judge(rows[2:], 2)
    for q in range(7):
        worth = {r: g for (asked, r), g in known.items() if asked == q and g > 0 and g >= min_grade}
        assert pairs.num_relevant[q] == len(worth)
        if q >= 2:
            assert judged.grades[q - 2].tolist() == [worth.get(int(row), 0) for row in rows[q]]
            assert judged.ideal[q - 2][: len(worth)].tolist() == sorted(worth.values(), reverse=True)


@pytest.mark.parametrize(
    ("grades", "words"),
    [([1, -1, 1], "grade -1"), ([1, np.nan, 1], "grade nan"), ([1, 2, 1], "grades 2 and 1; give each pair once")],
)
def test_sheets_that_contradict_themselves_are_refused(grades: list[float], words: str) -> None:
    """scikit-learn 23461: a negative grade takes nDCG out of [0, 1]."""
    with pytest.raises(UsageError, match=words):
        ByPairs(np.array([0, 1, 1]), np.array([3, 3, 3]), np.array(grades, float), num_queries=2)
