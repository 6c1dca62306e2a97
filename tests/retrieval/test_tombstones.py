"""Rows under tombstones: stored, but in no answer of any plan, filter or index type."""

import numpy as np
import pytest

from lookalike.errors import ArtifactError
from lookalike.retrieval.index_types import SHORTLISTS
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.shard_meta import SHARD_META, TOMBSTONES_FILE
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.store_writer import write_tombstones

PLANS = [
    Plan.exact(32),
    Plan(shortlist_dim=8, shortlist_k=100, rerank_dim=32),
    Plan(shortlist_dim=8, shortlist_k=60, stages=[(16, 30)], rerank_dim=32),
    Plan(shortlist_dim=4, shortlist_k=300, scan=True, rerank_dim=32),
]


def bury(shard: ShardSearcher, deleted: np.ndarray, said: int | None = None) -> ShardSearcher:
    """The shard with tombstones on some rows, opened again."""
    folder = shard.store.folder
    write_tombstones(folder, deleted)
    meta = shard.meta.model_copy(update={"num_deleted": int(deleted.sum()) if said is None else said})
    with open(f"{folder}/{SHARD_META}", "w") as file:
        file.write(meta.model_dump_json())
    return ShardSearcher.open(folder)


def brute_force(vectors, queries, allowed, k):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.97])
@pytest.mark.parametrize("kind", sorted(SHORTLISTS))
def test_deleted_rows_are_in_no_answer(make_shard, vectors, queries, kind, share):
    generator = np.random.default_rng(3)
    deleted = generator.random(300) < share
    colours = [("red", "blue")[n % 2] for n in range(300)]
    shard = bury(make_shard(vectors, kind=kind, offset=50, columns={"colour": colours}), deleted)
    red = np.array(colours) == "red"
    mask = generator.random(300) < 0.5
    asked = np.vstack([queries, vectors[deleted][:20]])  # the deleted rows themselves
    for allowed, rows in (
        (None, ~deleted),
        ({}, ~deleted),
        ({"colour": ["red"]}, red & ~deleted),
        (mask, mask & ~deleted),
    ):
        for plan in PLANS:
            found = shard.search(asked, 20, plan, allowed).rows
            inside = found[found >= 0] - 50
            assert rows[inside].all()
            assert ((found >= 0).sum(axis=1) == min(20, rows.sum())).all()
        exact = shard.search(asked, 5, PLANS[0], allowed).rows
        keep = min(5, rows.sum())
        np.testing.assert_array_equal(exact[:, :keep] - 50, brute_force(vectors, asked, rows, keep))
        candidates = shard.shortlist(asked, 5, PLANS[1], allowed).rows
        assert rows[candidates[candidates >= 0] - 50].all()
    for row in range(300):
        assert shard.find(f"id-{row:06d}") == (-1 if deleted[row] else row + 50)


def test_a_shard_of_deleted_rows_answers_nothing(make_shard, vectors, queries):
    shard = bury(make_shard(vectors, kind="hnsw"), np.ones(300, bool))
    for plan in PLANS:
        hits = shard.search(queries, 5, plan)
        assert (hits.rows == -1).all()
        assert (hits.scores == -np.inf).all()


@pytest.mark.parametrize("said", [9, 11, 300])
def test_tombstones_that_are_not_as_many_as_recorded_are_refused(make_shard, vectors, said):
    deleted = np.zeros(300, bool)
    deleted[:10] = True
    with pytest.raises(ArtifactError, match=rf"{TOMBSTONES_FILE} marks 10 rows, shard.json says {said}"):
        bury(make_shard(vectors), deleted, said)
