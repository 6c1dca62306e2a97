"""The searcher over two shards: rows, ids, metadata and vectors."""

import numpy as np
import pytest

from lookalike.errors import ArtifactError, UsageError
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
