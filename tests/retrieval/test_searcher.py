"""The searcher over two shards: rows, ids, metadata and vectors."""

import numpy as np
import pytest

from lookalike.errors import ArgumentError, ArtifactError, UsageError
from lookalike.retrieval.searcher import Searcher


def test_rows_lead_to_ids_metadata_and_vectors_and_back(searcher):
    rows = np.array([0, 1600, 2999, 5, -1])
    assert searcher.ids(rows) == ["id-000000", "id-000000", "id-001399", "id-000005", ""]
    assert searcher.metadata(rows)[3:] == [{"image_id": "id-000005"}, {}]
    np.testing.assert_array_equal(searcher.vectors([1600])[0], searcher.shards[1].store.read(np.array([0]))[0])
    assert [shard.find("id-000007") for shard in searcher.shards] == [7, 1607]
    assert [shard.find(name) for shard in searcher.shards for name in ("", "id-00000", "zz")] == [-1] * 6
    for wrong in (3000, -2):
        with pytest.raises(UsageError, match="outside"):
            searcher.ids([wrong])
    with pytest.raises(UsageError, match="no vector"):
        searcher.vectors([-1])


def test_shards_that_are_not_those_of_the_index_are_refused(searcher):
    with pytest.raises(ArtifactError, match="build the index again"):
        Searcher(searcher.meta, searcher.shards[::-1])


def test_one_value_counts_as_a_list_of_one(searcher):
    assert searcher.find("id-000007").tolist() == searcher.find(["id-000007"]).tolist()
    assert searcher.find("12").tolist() == [-1]  # one id, not two letters
    vector = searcher.vectors([3])
    hits = [
        searcher.search(vector, 2, allowed=allowed).rows.tolist()
        for allowed in (
            {"image_id": "id-000007"},
            {"image_id": ["id-000007"]},
            {"image_id": (name for name in ["id-000007"])},
        )
    ]
    assert hits == [hits[0]] * 3
    assert set(hits[0][0]) <= {7, 1607}


VECTOR = np.ones(32, np.float32)
WRONG = [
    ("search", [VECTOR, True], {}, "k=True"),
    ("search", [VECTOR, 5.0], {}, "k=5.0"),
    ("search", [VECTOR, 2**40], {}, "k=1099511627776 is more than"),
    ("search", [VECTOR, 0], {}, "k is 0"),
    ("search", [VECTOR, 5, "exact"], {}, "plan is 'exact'"),
    ("search", [VECTOR, 5, None, []], {}, "row filter is a list"),
    ("search", [VECTOR, 5, None, "view=icon"], {}, "row filter is 'view=icon'"),
    ("search", [VECTOR, 5, None, {"image_id": 3}], {}, "is 3, which cannot be iterated"),
    ("search", [VECTOR, 5, None, {"image_id": [3]}], {}, "no text"),
    ("search", [VECTOR, 5, None, {"colour": "red"}], {}, "'colour'"),
    ("search", [VECTOR, 5], {"where": {}}, "did you mean 'allowed'"),
    ("search", [VECTOR, 5], {"num_thread": 2}, "did you mean 'num_threads'"),
    ("search", [VECTOR, 5], {"num_threads": 0}, "num_threads=0"),
    ("search", [["1"] * 32, 5], {}, "give numbers"),
    ("search", [[[1.0] * 32, [1.0]], 5], {}, "no array of numbers"),
    ("search", [[True] * 32, 5], {}, "of bool"),
    ("search", [np.ones(32, complex), 5], {}, "complex"),
    ("search", [np.ones(32, object), 5], {}, "object"),
    ("search", [(1.0 for _ in range(32)), 5], {}, "generator"),
    ("search", [np.full(32, 1e300), 5], {}, "beyond float32"),
    ("search", [np.ma.masked_array(VECTOR, VECTOR > 0), 5], {}, "masked"),
    ("search", [np.ones((1, 1, 32)), 5], {}, "shape"),
    ("ids", [[1.7]], {}, "whole numbers"),
    ("ids", [["1"]], {}, "give numbers"),
    ("metadata", [[None]], {}, "give numbers"),
    ("vectors", [[True]], {}, "of bool"),
    ("find", [b"id"], {}, "ids is 2 bytes"),
    ("find", [[7]], {}, "is 7, which is no text"),
    ("find", [["\ud800"]], {}, "surrogate"),
    ("column", [["image_id"]], {}, "name is a list"),
    ("column", ["view"], {}, "no column 'view'"),
]


@pytest.mark.parametrize("case", WRONG, ids=[f"{case[0]}-{number}" for number, case in enumerate(WRONG)])
def test_wrong_arguments_are_named(searcher, case):
    method, args, named, words = case
    with pytest.raises(UsageError, match=words):
        getattr(searcher, method)(*args, **named)


def test_an_index_is_opened_by_its_uri():
    with pytest.raises(ArgumentError, match="uri is 3"):
        Searcher.open(3)
