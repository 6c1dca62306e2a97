from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.annotations import ANNOTATIONS
from lookalike.data.concreteness import train_probes
from lookalike.data.dictionary import (
    POOL,
    SKETCH,
    DictionaryConfig,
    ProbeConfig,
    Samples,
    decide,
    merge_sketches,
    sketch_part,
    wilson_interval,
)  # fmt: skip

CONFIG = DictionaryConfig(positives=8, pool=40, min_units=4)


def make_part(count: int, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Annotations and rows: products of three views, two data sets, three terms."""
    rng = np.random.default_rng(seed)
    rows, named = [], []
    for n in range(count):
        dataset = "a" if n % 2 else "b"
        group = f"{seed}-p{n // 3}" if dataset == "a" else None
        rows.append({"image_id": f"{seed}-{n}", "group": group, "dataset": dataset})
        for term in ("red", "round", "odd"):
            if rng.random() < 0.4:
                score = float(rng.choice([0.5, 0.9]))
                named.append({"image_id": f"{seed}-{n}", "term": term, "score": score, "split": "train"})
    schema = pa.schema([("image_id", pa.string()), ("group", pa.string()), ("dataset", pa.string())])
    return pa.Table.from_pylist(named, schema=ANNOTATIONS), pa.Table.from_pylist(rows, schema=schema)


def sketch_in_parts(cuts: list[int]) -> pa.Table:
    annotations, rows = make_part(120)
    edges = [0, *sorted(cuts), rows.num_rows]
    parts = []
    for start, end in pairwise(edges):
        part = rows.slice(start, end - start)
        named = annotations.filter(pc.is_in(annotations["image_id"], value_set=part["image_id"].combine_chunks()))
        parts.append(sketch_part(named, part, CONFIG, 0.6, 7))
    return reduce(lambda a, b: merge_sketches(a, b, CONFIG), parts, SKETCH.empty_table())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=6))
def test_sketches_merge_to_the_sketch_of_the_whole(cuts: list[int]) -> None:
    order = [("key", "ascending"), ("unit_hash", "ascending")]
    assert sketch_in_parts(cuts).sort_by(order).to_pylist() == sketch_in_parts([]).sort_by(order).to_pylist()


def test_a_unit_gives_one_sample_and_only_confident_ones() -> None:
    annotations, rows = make_part(120)
    sketch = pl.DataFrame(pl.from_arrow(sketch_in_parts([40, 80])))
    group = dict(zip(rows["image_id"].to_pylist(), rows["group"].to_pylist(), strict=True))
    confident = {(r["term"], r["image_id"]) for r in annotations.to_pylist() if r["score"] > 0.6}
    for key in sketch["key"].unique().to_list():
        images = sketch.filter(pl.col("key") == key)["image_id"].to_list()
        units = [group[image] or image for image in images]
        assert len(units) == len(set(units)) <= (CONFIG.pool if key.startswith(POOL) else CONFIG.positives)
        assert key.startswith(POOL) or {(key, image) for image in images} <= confident


def test_negatives_lack_the_term_and_come_from_the_same_data_sets() -> None:
    annotations, rows = make_part(120)
    samples = Samples(sketch_in_parts([]), ["odd", "red", "round", "absent"], CONFIG, 7)
    has = {(r["term"], r["image_id"]) for r in annotations.to_pylist()}
    dataset = dict(zip(rows["image_id"].to_pylist(), rows["dataset"].to_pylist(), strict=True))
    assert set(samples.chosen) == {"odd", "red", "round"}
    for term, (positives, negatives) in samples.chosen.items():
        assert all((term, image) in has for image in positives)
        assert not any((term, image) in has for image in negatives)
        assert sorted(map(dataset.get, positives)) == sorted(map(dataset.get, negatives))


def questions_for(labels: Any, rows: Any, folds: int) -> Any:
    from lookalike.data.dictionary import Questions

    index = np.array(rows, np.int64)
    return Questions(index, np.array(labels, np.float32), np.arange(index.shape[1])[None].repeat(len(index), 0) % folds)


def test_a_visible_term_scores_high_and_a_random_one_near_chance() -> None:
    """Concreteness is held-out accuracy: a label that follows the picture is learned, a coin toss is not."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 12)).astype(np.float32)
    visible = (features[:, 0] + features[:, 3] > 0).astype(np.float32)
    toss = (rng.random(120) < 0.5).astype(np.float32)
    config = ProbeConfig(folds=3)
    hits = train_probes(features, questions_for([visible, toss], [np.arange(120)] * 2, 3), config, 1) / 120
    assert hits[0] > 0.85
    assert abs(hits[1] - 0.5) < 0.15


def test_a_terms_result_does_not_depend_on_the_terms_beside_it() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 6)).astype(np.float32)
    labels = (rng.random((5, 60)) < 0.5).astype(np.float32)
    rows = np.stack([rng.permutation(60) for _ in range(5)])
    rows[2, 40:] = -1
    config = ProbeConfig(steps=20)
    together = train_probes(features, questions_for(labels, rows, 3), config, 1)
    single = [questions_for(labels[i : i + 1], rows[i : i + 1], 3) for i in range(5)]
    alone = [train_probes(features, questions, config, 1)[0] for questions in single]
    assert together.tolist() == alone
    assert together[2] <= 40


def test_wilson_interval_against_scipy() -> None:
    from scipy.stats import binomtest

    hits, trials = np.array([0, 3, 9, 50]), np.array([4, 8, 9, 60])
    low, high = wilson_interval(hits, trials)
    for i in range(4):
        oracle = binomtest(int(hits[i]), int(trials[i])).proportion_ci(0.95, method="wilson")
        assert (low[i], high[i]) == pytest.approx((oracle.low, oracle.high), abs=1e-4)
    assert [float(v[0]) for v in wilson_interval(np.array([0]), np.array([0]))] == [0.0, 1.0]


def test_terms_with_too_few_samples_are_reported_not_scored() -> None:
    samples = Samples(sketch_in_parts([]), ["absent", "odd", "red"], CONFIG, 7)
    trials = 2 * len(samples.chosen["odd"][0])
    table = decide({"absent": 9, "odd": 40, "red": 40}, samples, {"odd": trials // 2, "red": trials}).to_pylist()
    assert [row["status"] for row in table] == ["too_few", "abstract", "kept"]
    assert table[0]["concreteness"] is None
    assert table[2]["concreteness"] == 1.0
