"""Row filters: the rows they allow, the recall they keep against brute force over these, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest

from lookalike.errors import UsageError
from lookalike.retrieval import filters
from lookalike.retrieval.filters import Allowed
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW
from tests.synthetic import make_vectors

DIMS = (64, 128)
NUM = 20_000
DATA, CLASSES = make_vectors(NUM + 40, 128, num_classes=200, seed=6)
STORED, QUERIES = DATA[:NUM], DATA[NUM:]
COLUMNS = {
    "view": [("icon", "front", None)[n % 3] for n in range(NUM)],
    "group": [f"g{label}" for label in CLASSES[:NUM]],
}
PLAN = Plan(shortlist_dim=64, shortlist_k=100, rerank_dim=128)
SHARES = (0.5, 0.1, 0.02, 0.0005)


def brute_force(mask, k):
    """Oracle: the k nearest allowed rows by float64 cosine."""
    rows = np.flatnonzero(mask)
    unit = STORED[rows].astype(np.float64) / np.linalg.norm(STORED[rows].astype(np.float64), axis=1, keepdims=True)
    return rows[np.argsort(-(QUERIES @ unit.T), axis=1)[:, :k]]


def random_mask(share):
    return np.random.default_rng(3).random(NUM) < share


def class_mask(share):
    """Whole classes, drawn until ``share`` of the rows are allowed; the last one in part."""
    mask = np.zeros(NUM, bool)
    for label in np.random.default_rng(4).permutation(200):
        rows = np.flatnonzero(CLASSES[:NUM] == label)
        mask[rows[: max(0, round(share * NUM) - int(mask.sum()))]] = True
    return mask


@pytest.fixture(scope="module")
def shards(open_shard, tmp_path_factory):
    """One shard a type, over the same vectors."""
    kinds = ("hnsw", "ivf", "ivf-rabitq")
    return {
        kind: open_shard(tmp_path_factory.mktemp(kind), STORED, dims=DIMS, kind=kind, columns=COLUMNS, shortlists=(64,))
        for kind in kinds
    }


@pytest.mark.parametrize("scanning", ["as measured", "never at first"])
@pytest.mark.parametrize("make_mask", [random_mask, class_mask])
@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-rabitq"])
def test_filters_keep_recall_from_half_of_the_rows_to_ten_of_them(shards, monkeypatch, kind, make_mask, scanning):
    if scanning == "never at first":  # the index is asked even where a scan is cheaper, down to a tenth
        monkeypatch.setattr(filters, "SCAN_ROWS", 0)
        monkeypatch.setattr(filters, "SCAN_GRAPH", 0)
        monkeypatch.setattr(filters, "SCAN_LISTS", 0)
    for share in SHARES if scanning == "as measured" else SHARES[:2]:
        mask = make_mask(share)
        found = shards[kind].search(QUERIES, 10, PLAN, mask)
        truth = brute_force(mask, 10)
        assert mask[found.rows[found.rows != NO_ROW]].all()
        recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.rows, truth, strict=True)])
        assert recall >= 0.95, (share, recall)


def test_few_rows_are_scanned_and_many_are_not(shards, monkeypatch):
    asked = []
    index = shards["hnsw"].index_over(64)
    original = index.search
    monkeypatch.setattr(index, "search", lambda *args, **kwargs: asked.append(1) or original(*args, **kwargs))
    for share, expected in ((0.02, False), (0.1, False), (0.9, True)):
        asked.clear()
        shards["hnsw"].search(QUERIES, 10, PLAN, random_mask(share))
        assert bool(asked) == expected
    few, many = Allowed(random_mask(0.1)), Allowed(random_mask(0.9))
    assert few.is_few(100, graph=True)
    assert not many.is_few(100, graph=True)
    assert not Allowed(random_mask(0.2)).is_few(100, graph=False)


def test_fewer_allowed_rows_than_asked_for_are_padded(shards):
    for count in (0, 3):
        mask = np.zeros(NUM, bool)
        mask[np.arange(count) * 500] = True
        for plan in (PLAN, Plan.exact(128)):
            hits = shards["ivf"].search(QUERIES[:4], 8, plan, mask)
            assert (hits.rows[:, count:] == NO_ROW).all()
            assert np.isneginf(hits.scores[:, count:]).all()
            assert (np.sort(hits.rows[:, :count], axis=1) == np.arange(count) * 500).all()


def test_an_exact_plan_stays_exact_under_a_filter(shards):
    mask = random_mask(0.3)
    for batch in (slice(0, 40), slice(0, 2)):
        hits = shards["hnsw"].search(QUERIES[batch], 10, Plan.exact(128), mask)
        np.testing.assert_array_equal(hits.rows, brute_force(mask, 10)[batch])


def test_conditions_are_the_mask_they_stand_for_and_are_evaluated_once(shards, monkeypatch):
    shard = shards["ivf"]
    view, group = np.array(COLUMNS["view"], dtype=object), np.array(COLUMNS["group"])
    for conditions, mask in (
        ({"view": ["icon"]}, view == "icon"),
        ({"view": ["front", "icon"], "group": ["g0", "g1", "g2"]}, (view != None) & np.isin(group, ["g0", "g1", "g2"])),  # noqa: E711
        ({"view": []}, np.zeros(NUM, bool)),
        ({"group": ["nobody"]}, np.zeros(NUM, bool)),
        ({}, np.ones(NUM, bool)),
    ):
        expected = shard.search(QUERIES, 5, Plan.exact(128), mask)
        np.testing.assert_array_equal(shard.search(QUERIES, 5, Plan.exact(128), conditions).rows, expected.rows)
    counted = []
    original = filters.pc.is_in
    monkeypatch.setattr(filters.pc, "is_in", lambda *args: counted.append(1) or original(*args))
    for values in (["icon", "side"], ["side", "icon"], ["side", "icon", "icon"]):
        shard.search(QUERIES, 5, PLAN, {"view": values})
    assert len(counted) == 1


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"colour": ["red"]}, "'colour'; the index has image_id, view, group"),
        ({"view": "icon"}, "list of strings"),
        ({"view": [3]}, "list of strings"),
        (np.ones(NUM - 1, bool), r"bool\[19999\]; give bool\[20000\]"),
        (np.ones(NUM), "float64"),
    ],
)
def test_bad_filters_are_refused(shards, allowed, message):
    with pytest.raises(UsageError, match=message):
        shards["ivf"].search(QUERIES, 5, PLAN, allowed)


def test_a_mask_over_all_shards_is_cut_at_their_borders(open_shard, index_of, tmp_path):
    parts = []
    for start, stop in ((0, 900), (900, 900), (900, 2000)):
        (tmp_path / f"{len(parts)}").mkdir()
        parts.append(
            open_shard(
                tmp_path / f"{len(parts)}",
                STORED[start:stop],
                dims=DIMS,
                offset=start,
                columns={"view": pa.array(COLUMNS["view"][start:stop], pa.string())},
            )
        )
    mask = np.zeros(NUM, bool)
    mask[:2000] = random_mask(0.2)[:2000]
    searcher = index_of(*parts, columns=("image_id", "view"))
    np.testing.assert_array_equal(searcher.search(QUERIES, 10, allowed=mask[:2000]).rows, brute_force(mask, 10))
    icons = np.array([n < 2000 and n % 3 == 0 for n in range(NUM)])
    np.testing.assert_array_equal(searcher.search(QUERIES, 10, PLAN, {"view": ["icon"]}).rows, brute_force(icons, 10))
    shared = searcher.search(QUERIES, 10, PLAN, {"view": ["icon"]}, num_threads=3)
    np.testing.assert_array_equal(shared.rows, brute_force(icons, 10))
    with pytest.raises(UsageError, match="give bool"):
        searcher.search(QUERIES, 10, allowed=mask)


def test_kept_filters_are_bounded_by_bytes(monkeypatch):
    from lookalike.retrieval import filters

    made = []

    def evaluate(key):
        made.append(key)
        return filters.Allowed(np.arange(80_000) % 2 == 0)

    cache = filters.FilterCache(evaluate)
    long = [((("view", ("x" * (10 << 20), str(number))),)) for number in range(6)]
    for key in [*long, *long]:
        cache.find(key)
    assert len(made) == 12  # two fit beside each other
    assert cache.size_bytes <= filters.FILTER_BYTES
    cache.find((("view", ("x" * (100 << 20),)),))
    assert cache.size_bytes == 0  # it does not fit alone
    short = [((("view", (str(number),)),)) for number in range(filters.FILTERS_KEPT)]
    made.clear()
    for key in [*short, *short]:
        cache.find(key).rows.sum()
    assert made == short
    monkeypatch.setattr(filters, "FILTER_BYTES", 1_000_000)  # listed rows count: 320 kB each
    cache.find((("view", ("more",)),))
    assert 0 < cache.size_bytes <= 1_000_000
