"""The one order of hits: score descending, then row ascending."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.retrieval.ranking import empty_hits, from_keys, merge_hits, sort_keys, top_k

FINITE = st.floats(-1, 1, width=32)


@given(st.lists(FINITE, min_size=1, max_size=30), st.integers(1, 35), st.integers(1, 5))
@settings(max_examples=60)
def test_merging_parts_in_any_split_is_ranking_the_whole(scores, k, parts):
    scores = np.round(np.array([scores], np.float32), 1)  # many ties
    rows = np.arange(scores.shape[1])[None] + 3
    whole = top_k(rows, scores, k)
    pieces = zip(np.array_split(rows, parts, 1), np.array_split(scores, parts, 1), strict=True)
    split = [top_k(piece_rows, piece_scores, k) for piece_rows, piece_scores in pieces]
    for order in (split, split[::-1]):
        merged = merge_hits([*order, empty_hits(1, 2)], k)
        np.testing.assert_array_equal(merged.rows, whole.rows)
        np.testing.assert_array_equal(merged.scores, whole.scores)
    expected = sorted(zip(-scores[0], rows[0], strict=True))[:k]
    assert whole.rows[0, : len(expected)].tolist() == [row for _, row in expected]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
@settings(max_examples=80)
def test_sort_keys_order_like_scores_then_rows_and_come_back(scores):
    scores = np.array([scores], np.float32)
    keys = sort_keys(scores, np.arange(scores.shape[1]) + 7)
    expected = np.lexsort((np.arange(scores.shape[1]), -scores[0]))
    np.testing.assert_array_equal(np.argsort(keys[0]), expected)
    back = from_keys(keys)
    np.testing.assert_array_equal(back.rows[0], np.arange(scores.shape[1]) + 7)
    np.testing.assert_array_equal(back.scores, scores)
