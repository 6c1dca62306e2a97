from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.dictionary.scores import DictionaryConfig
from lookalike.data.dictionary.sketch import (
    POOL,
    Pools,
    assign_folds,
    buckets_of,
    choose_samples,
    find_limits,
    merge_all,
    merge_sketches,
    sketch_part,
)
from lookalike.data.features import vectors_of
from lookalike.data.text.annotations import ANNOTATIONS
from lookalike.sampling import mix_keys, stable_keys

CONFIG = DictionaryConfig(positives=8, pool=40, min_units=4)
TERMS = ("red", "round", "odd")


def make_part(count: int, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Annotations and rows: products of three views, two data sets, three terms; a vector holds its row's number."""
    rng = np.random.default_rng(seed)
    rows, named = [], []
    for n in range(count):
        dataset = "a" if n % 2 else "b"
        group = f"{seed}-p{n // 3}" if dataset == "a" else None
        vector = np.array([n, n % 7], np.float16)
        rows.append(
            {
                "image_id": f"{seed}-{n}",
                "group": group,
                "dataset": dataset,
                "vector": vector,
                "creator": None if n % 5 == 0 else f"c{n % 8}",
            }
        )
        for term in TERMS:
            if rng.random() < 0.4:
                score = float(rng.choice([0.5, 0.9]))
                named.append({"image_id": f"{seed}-{n}", "term": term, "score": score, "split": "train"})
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("group", pa.string()),
            ("dataset", pa.string()),
            ("creator", pa.string()),
            ("vector", pa.list_(pa.float16(), 2)),
        ]
    )
    return pa.Table.from_pylist(named, schema=ANNOTATIONS), pa.Table.from_pylist(rows, schema=schema)


def parts_of(cuts: list[int], limits: pa.Table | None = None, config: DictionaryConfig = CONFIG) -> list[pa.Table]:
    annotations, rows = make_part(120)
    parts = []
    for start, end in pairwise([0, *sorted(cuts), rows.num_rows]):
        part = rows.slice(start, end - start)
        named = annotations.filter(pc.is_in(annotations["image_id"], value_set=part["image_id"].combine_chunks()))
        parts.append(sketch_part(named, part, config, high=0.6, seed=7, limits=limits))
    return parts


def whole(config: DictionaryConfig = CONFIG) -> pa.Table:
    return merge_sketches(parts_of([], config=config), config)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 120), max_size=6), st.sampled_from([40, 10]))
def test_sketches_merge_to_the_sketch_of_the_whole(cuts: list[int], pool_total: int) -> None:
    """However the rows are cut, in whatever order sketches meet, also where the data sets share a bound."""
    config = CONFIG.model_copy(update={"pool_total": pool_total})
    parts = parts_of(cuts, config=config)
    expected = whole(config)
    assert merge_sketches(parts[::-1], config).equals(expected)
    assert merge_all(iter(parts), config).equals(expected)


def test_merging_in_steps_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookalike.data.dictionary.sketch.MERGE_ROWS", 5)
    assert merge_all(iter(parts_of([10, 20, 50, 90])), CONFIG).equals(whole())


def test_limits_leave_out_what_would_be_cut_and_nothing_else() -> None:
    light = [part.select(["key", "unit_hash"]) for part in parts_of([30, 60, 90])]
    limits = find_limits(pa.concat_tables(light), CONFIG)
    parts = parts_of([30, 60, 90], limits)
    assert merge_sketches(parts, CONFIG).equals(whole())
    assert sum(p.num_rows for p in parts) < sum(p.num_rows for p in parts_of([30, 60, 90]))
    last = whole().group_by("key").aggregate([("unit_hash", "max"), ([], "count_all")]).to_pylist()
    full = {
        row["key"]: row["unit_hash_max"]
        for row in last
        if row["count_all"] == (CONFIG.pool if row["key"].startswith(POOL) else CONFIG.positives)
    }
    assert {row["key"]: row["limit"] for row in limits.to_pylist()} == full
    assert set(TERMS) <= set(full)


def test_a_sketch_is_the_units_of_smallest_hash() -> None:
    """Brute force: per key the best image of each unit, the first of them by hash."""
    annotations, rows = make_part(120)
    images = {row["image_id"]: row for row in rows.to_pylist()}

    def hashes(image: str) -> tuple[int, int]:
        unit = images[image]["group"] or image
        keys = [mix_keys(stable_keys([name]), 7, what)[0] for name, what in ((unit, "unit"), (image, "image"))]
        return int(keys[0]), int(keys[1])

    for term in TERMS:
        confident = [r["image_id"] for r in annotations.to_pylist() if r["term"] == term and r["score"] > 0.6]
        best: dict[int, tuple[int, str]] = {}
        for image in confident:
            unit, key = hashes(image)
            best[unit] = min(best.get(unit, (key, image)), (key, image))
        expected = [best[unit][1] for unit in sorted(best)[: CONFIG.positives]]
        found = whole().filter(pc.equal(whole()["key"], term))
        assert found["image_id"].to_pylist() == expected
        assert vectors_of(found)[:, 0].tolist() == [float(image.split("-")[1]) for image in expected]


def test_many_data_sets_share_the_pool() -> None:
    config = CONFIG.model_copy(update={"pool_total": 12})
    counts = pl.DataFrame(pl.from_arrow(whole(config))).filter(pl.col("key").str.starts_with(POOL))["key"]
    assert counts.value_counts()["count"].to_list() == [6, 6]
    assert DictionaryConfig(pool_total=100, min_units=6).pool_size(50) == 6
    assert DictionaryConfig().pool_size(2) == 2048


def samples() -> dict[str, Any]:
    sketch = whole()
    pool = pc.starts_with(sketch["key"], POOL)
    return {
        chosen.term: chosen
        for chosen in choose_samples(sketch.filter(pc.invert(pool)), Pools(sketch.filter(pool)), 3, 7)
    }


def test_negatives_lack_the_term_and_come_from_the_same_data_sets_and_other_units() -> None:
    annotations, rows = make_part(120)
    has = {(r["term"], r["image_id"]) for r in annotations.to_pylist()}
    images = {row["image_id"]: row for row in rows.to_pylist()}
    found = samples()
    assert list(found) == sorted(TERMS)
    for term, (_, sampled, sides) in found.items():
        positives, negatives = ([f"0-{int(n)}" for n in side[:, 0]] for side in sides[:2])
        assert sampled == CONFIG.positives == len(positives)
        assert all((term, image) in has for image in positives)
        assert not any((term, image) in has for image in negatives)
        assert sorted(images[i]["dataset"] for i in positives) == sorted(images[i]["dataset"] for i in negatives)
        units = [images[image]["group"] or image for image in positives + negatives]
        assert len(units) == len(set(units))


def test_a_terms_sample_does_not_depend_on_its_bucket() -> None:
    sketch = whole()
    pools = Pools(sketch.filter(pc.starts_with(sketch["key"], POOL)))
    for term, together in samples().items():
        (alone,) = choose_samples(sketch.filter(pc.equal(sketch["key"], term)), pools, 3, 7)
        assert alone.term == term
        for side, other in zip(alone.sample, together.sample, strict=True):
            assert np.array_equal(side, other)


def test_negatives_are_a_random_choice_of_the_pool() -> None:
    """The first by a hash of image and term: brute force over the pool."""
    sketch = whole()
    pools = Pools(sketch.filter(pc.starts_with(sketch["key"], POOL)))
    pool = [row for row in sketch.to_pylist() if row["key"] == POOL + "b"]
    fitting = [row for row in pool if "red" not in (row["terms"] or ())]
    keys = mix_keys(np.array([row["image_hash"] for row in fitting], np.uint64), 7, "negatives", "red")
    expected = [fitting[i]["vector"][0] for i in np.argsort(keys)[:5]]
    place = pools.terms.to_pylist().index("red")
    rows = pools.without("red", pools.rows_of(place), np.zeros(0, np.uint64), dataset="b", count=5, seed=7)
    assert pools.vectors[rows][:, 0].tolist() == expected
    assert not len(pools.without("red", rows[:0], np.zeros(0, np.uint64), dataset="none", count=5, seed=7))


def test_buckets_follow_the_term_alone() -> None:
    keys = pa.chunked_array([["red", POOL + "a", "round"], ["red", POOL + "b"]])
    found = buckets_of(keys, 5).tolist()
    assert found[0] == found[3] == int(stable_keys(["red"])[0] % np.uint64(5))
    assert found[1] == found[4] == 5
    assert buckets_of(pa.array(["round"]), 5).tolist() == [found[2]]


def test_what_one_creator_made_has_one_origin_unless_it_is_most_of_a_data_set() -> None:
    annotations, rows = make_part(120)
    images = {row["image_id"]: row for row in rows.to_pylist()}
    sketch = whole()
    pools = Pools(sketch.filter(pc.starts_with(sketch["key"], POOL)))
    made: dict[int, set[str]] = {}
    for row, origin in zip(sketch.to_pylist(), sketch["origin"].to_pylist(), strict=True):
        image = images[row["image_id"]]
        made.setdefault(origin, set()).add(image["creator"] or image["group"] or row["image_id"])
    assert all(len(creators) == 1 for creators in made.values())
    assert len(made) == len({creator for creators in made.values() for creator in creators}) > 8
    for _, _, sample in samples().values():
        creators = [images[f"0-{int(n)}"]["creator"] for n in np.concatenate(sample[:2])[:, 0]]
        folds = {(creator, fold) for creator, fold in zip(creators, sample.folds.tolist(), strict=True) if creator}
        assert len(folds) == len({creator for creator, _ in folds})
    plain = sketch_part(
        annotations, rows, CONFIG.model_copy(update={"hold_out_creators": False}), high=0.6, seed=7, limits=None
    )
    assert plain["origin"].equals(plain["unit_hash"])
    one = rows.set_column(rows.column_names.index("creator"), "creator", pa.array(["all of it"] * 120))
    same = sketch_part(annotations, one, CONFIG, high=0.6, seed=7, limits=None)
    assert len(same["origin"].unique()) == 1
    large = Pools(same.filter(pc.starts_with(same["key"], POOL)))
    assert np.array_equal(large.origins, large.units)
    assert not np.array_equal(pools.origins, pools.units)


@given(st.lists(st.integers(0, 30), min_size=3, max_size=60), st.integers(2, 5), st.randoms())
def test_an_origin_lies_in_one_fold(origins: list[int], folds: int, random: Any) -> None:
    both = [*origins, *random.sample(origins, len(origins))]
    found = assign_folds(np.array(both, np.uint64), folds)
    assert len(set(zip(both, found.tolist(), strict=True))) == len(set(both))
    assert set(found.tolist()) <= set(range(folds))


@given(st.integers(3, 60), st.integers(2, 5))
def test_folds_of_separate_origins_are_of_one_size_on_both_sides(half: int, folds: int) -> None:
    found = assign_folds(np.random.default_rng(half).permutation(2 * half).astype(np.uint64), folds)
    for side in (found[:half], found[half:]):
        counts = np.bincount(side, minlength=folds)
        assert counts.max() - counts.min() <= 1
