"""Samples of every term in one pass: bottom-k sketches, which merge in any order.

The sketch of a key holds its units with the smallest hashes. The sketch of a term samples its positives; the sketch of
a data set, whose key starts with ``POOL``, holds random images, from which negatives are taken. A unit (a product, or
an image without one) gives at most one sample, so views of a product are never on both sides of a hold-out. The same
holds for pictures of one origin (creator): a classifier can recognise a term used by a single icon set from the set's
style alone. Each row carries the vector of its image, so nothing has to be looked up afterwards.

When many tasks make sketches, most of their rows are cut again as sketches merge. A first, light pass (keys and hashes
only) lets ``find_limits`` tell the largest hash that each sketch will hold; with these limits the second pass sends
little more than the samples. The result is the same with and without limits.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.data.features import vectors_of
from lookalike.sampling import mix_keys, stable_keys

POOL = "\x00"  # prefix of the keys of data sets; the other keys are terms
MERGE_ROWS = 1 << 16  # rows of sketches that are collected before they are merged
LARGE_SHARE = 1 / 3  # a creator of a larger share of a data set is ignored there: that many pictures cannot be held out

SKETCH = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("unit_hash", pa.uint64()),
        pa.field("image_hash", pa.uint64()),
        pa.field("image_id", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("origin", pa.uint64()),
        pa.field("terms", pa.list_(pa.string())),
    ]
)
"""Columns of a sketch, and ``vector`` if the rows had one. ``origin``: hash of the creator, or else of the unit, whose
rows are held out together. ``terms``: all terms of the image, in pools only."""
LIMITS = pa.schema([("key", pa.string()), ("limit", pa.uint64())])
"""Largest unit hash in the sketch of a key."""
_ORDER = ["key", "unit_hash", "image_hash", "image_id"]


class SampleConfig(Config):
    """How many images are sampled."""

    positives: int = Field(96, ge=4, le=10_000)
    """P: most positives of a term; there are as many negatives."""
    pool: int = Field(2048, ge=16, le=1_000_000)
    """Random images of each data set, from which negatives are taken."""
    pool_total: int = Field(65_536, ge=16, le=10_000_000)
    """Most random images of all data sets together: with many data sets each gets fewer. Every task holds these."""
    min_units: int = Field(6, ge=2)
    """Fewest positives (and negatives), from different products or images, for a term to be scored."""
    hold_out_creators: bool = True
    """Hold out all pictures of a creator together: classifiers must recognise a term in pictures of other creators."""

    def pool_size(self, datasets: int) -> int:
        """Random images of each of ``datasets`` data sets, at least ``min_units``."""
        return max(self.min_units, min(self.pool, self.pool_total // max(datasets, 1)))


def sketch_part(
    annotations: pa.Table, rows: pa.Table, config: SampleConfig, *, high: float, seed: int, limits: pa.Table | None
) -> pa.Table:
    """Sketch of a part with the kept training rows ``rows`` (image_id, group, dataset, creator; vector if wanted).

    ``annotations``: the terms of the part; an image is a positive of terms that score at least ``high``. ``limits``
    (``LIMITS``): rows with a larger unit hash than the limit of their key are left out.
    """
    frame = _hashed(rows, config.hold_out_creators, seed)
    named = pl.DataFrame(annotations.select(["image_id", "term", "score"]))
    least = float(np.float32(high))  # scores are stored in single precision
    positive = named.filter(pl.col("score") >= least).join(frame, on="image_id").with_columns(key=pl.col("term"))
    pool = frame.with_columns(key=POOL + pl.col("dataset"))
    both = pl.concat([side.select("row", *_ORDER) for side in (pool, positive)])
    if limits is not None:
        both = both.join(pl.DataFrame(limits), on="key", how="left").filter(
            pl.col("unit_hash") <= pl.col("limit").fill_null(2**64 - 1)
        )
    sketch = _cut(both, config)
    terms = named.join(frame, on="image_id").group_by("row").agg(terms=pl.col("term").sort())
    sketch = sketch.join(terms, on="row", how="left", maintain_order="left").with_columns(
        terms=pl.when(pl.col("key").str.starts_with(POOL)).then("terms")
    )
    details = (frame[name].gather(sketch["row"]) for name in ("dataset", "origin"))
    table = sketch.select(*_ORDER, *details, "terms").to_arrow().cast(SKETCH)
    if "vector" in rows.column_names:
        table = table.append_column("vector", rows["vector"].combine_chunks().take(sketch["row"].to_arrow()))
    return table


def _hashed(rows: pa.Table, by_creator: bool, seed: int) -> pl.DataFrame:
    """``rows`` without vectors, with the row number and the hashes of unit, image and origin."""
    frame = pl.DataFrame(rows.select(["image_id", "group", "dataset", "creator"]))
    unit = frame["group"].fill_null(frame["image_id"])
    units = mix_keys(stable_keys(unit.to_list()), seed, "unit")
    images = mix_keys(stable_keys(frame["image_id"].to_list()), seed, "image")
    creators = mix_keys(stable_keys(frame["creator"].fill_null("").to_list()), seed, "origin")
    has_creator = (frame["creator"].fill_null("") != "").to_numpy() & by_creator
    hashes = {"unit_hash": units, "image_hash": images, "origin": np.where(has_creator, creators, units)}
    return frame.with_columns(
        row=pl.int_range(pl.len(), dtype=pl.Int64),
        **{name: pl.Series(values, dtype=pl.UInt64) for name, values in hashes.items()},
    )


def _cut(frame: pl.DataFrame, config: SampleConfig) -> pl.DataFrame:
    """One row per unit of a key, at most as many as the key may have, by hash; in order of ``_ORDER``.

    The bound of a pool falls with the number of data sets seen, so a part never cuts a row that the whole would keep.
    """
    units = frame.sort(_ORDER).unique(["key", "unit_hash"], keep="first", maintain_order=True)
    pool = pl.col("key").str.starts_with(POOL)
    datasets = units.filter(pool)["key"].n_unique()
    limit = pl.when(pool).then(config.pool_size(datasets)).otherwise(config.positives)
    return units.filter(pl.int_range(pl.len()).over("key") < limit)


def merge_sketches(tables: Sequence[pa.Table], config: SampleConfig) -> pa.Table:
    """The sketch of all parts: associative, commutative, and equal to the sketch of their union."""
    table = pa.concat_tables(tables)
    frame = pl.DataFrame(table.select(_ORDER)).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    return table.take(_cut(frame, config)["row"].to_arrow()).combine_chunks()


def merge_all(tables: Iterable[pa.Table], config: SampleConfig) -> pa.Table:
    """``merge_sketches`` of a stream of at least one table; memory: twice the sketch, and ``MERGE_ROWS``."""
    merged: list[pa.Table] = []
    waiting = 0
    for table in tables:
        merged.append(table)
        waiting += table.num_rows
        if waiting > MERGE_ROWS + merged[0].num_rows:
            merged, waiting = [merge_sketches(merged, config)], 0
    return merge_sketches(merged, config)


def find_limits(units: pa.Table, config: SampleConfig) -> pa.Table:
    """``LIMITS`` of the keys in ``units`` (key, unit_hash), a whole bucket.

    Keys with fewer units than they may have get no limit.
    """
    frame = pl.DataFrame(units.select(["key", "unit_hash"])).unique().sort("key", "unit_hash")
    pool = pl.col("key").str.starts_with(POOL)
    datasets = frame.filter(pool)["key"].n_unique()
    last = pl.when(pool).then(config.pool_size(datasets)).otherwise(config.positives) - 1
    limits = frame.filter(pl.int_range(pl.len()).over("key") == last).rename({"unit_hash": "limit"})
    return limits.to_arrow().cast(LIMITS)


def buckets_of(keys: pa.ChunkedArray | pa.Array, buckets: int) -> NDArray[np.int64]:
    """Bucket of each key: below ``buckets`` for a term, by its hash; ``buckets`` for all pools."""
    coded = pl.Series(pl.from_arrow(keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys))
    names = coded.unique().sort()
    numbers = (stable_keys(names.to_list()) % np.uint64(buckets)).astype(np.int64)
    numbers[names.str.starts_with(POOL).to_numpy()] = buckets
    places = pc.index_in(keys, value_set=names.to_arrow()).to_numpy()
    return np.asarray(numbers[places], dtype=np.int64)


class Pools:
    """Random images of each data set with their terms, as flat arrays, which tasks share without copies.

    Memory: ``pool_total`` x (2 bytes x dim + 28 bytes + 8 bytes a term), and every distinct term once.
    """

    def __init__(self, sketch: pa.Table) -> None:
        sketch = sketch.sort_by([(name, "ascending") for name in _ORDER])
        self.vectors = vectors_of(sketch)
        self.units, self.images = sketch["unit_hash"].to_numpy(), sketch["image_hash"].to_numpy()
        self.origins = sketch["origin"].to_numpy().copy()
        keys = [key[len(POOL) :] for key in sketch["key"].to_pylist()]
        starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
        self._spans = {keys[start]: (start, stop) for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True)}
        self._large = {name: self._find_large(start, stop) for name, (start, stop) in self._spans.items()}
        for name, (start, stop) in self._spans.items():
            self.origins[start:stop] = self.origins_of(name, self.origins[start:stop], self.units[start:stop])
        lists = sketch["terms"].combine_chunks()
        named = pl.DataFrame(
            {"term": pl.from_arrow(lists.flatten()), "row": pl.from_arrow(pc.list_parent_indices(lists))}
        ).sort("term", "row")
        counts = named.group_by("term").agg(n=pl.len()).sort("term")
        self.terms: pa.Array = counts["term"].to_arrow()
        self.rows = named["row"].to_numpy()
        self.ends = np.cumsum(counts["n"].to_numpy())

    def _find_large(self, start: int, stop: int) -> NDArray[np.uint64]:
        origins, counts = np.unique(self.origins[start:stop], return_counts=True)
        return np.asarray(origins[counts > LARGE_SHARE * (stop - start)], dtype=np.uint64)

    def origins_of(self, dataset: str, origins: NDArray[np.uint64], units: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What is held out together, for images of ``dataset``: the origin, or the unit if the origin is large."""
        large = self._large.get(dataset)
        return origins if large is None else np.where(np.isin(origins, large), units, origins)

    def rows_of(self, place: int) -> NDArray[np.integer]:
        """Pool rows of the images with the term ``terms[place]``."""
        return self.rows[self.ends[place - 1] if place else 0 : self.ends[place]]

    def without(
        self, term: str, has: NDArray[np.integer], units: NDArray[np.uint64], *, dataset: str, count: int, seed: int
    ) -> NDArray[np.int64]:
        """Rows of up to ``count`` random images of ``dataset`` that are neither in ``has`` nor of ``units``."""
        start, stop = self._spans.get(dataset, (0, 0))
        fitting = ~np.isin(self.units[start:stop], units)
        fitting[has[(has >= start) & (has < stop)] - start] = False
        rows = np.nonzero(fitting)[0] + start
        keys = mix_keys(self.images[rows], seed, "negatives", term)
        return np.asarray(rows[np.argsort(keys, kind="stable")[:count]], dtype=np.int64)


class Sample(NamedTuple):
    """Feature vectors of the positives and negatives of a term: equally many, from the same data sets."""

    positives: NDArray[np.float16]
    """[n, D]"""
    negatives: NDArray[np.float16]
    """[n, D]"""
    folds: NDArray[np.int64]
    """[2n]: the fold that holds out each image, positives first."""


class TermSample(NamedTuple):
    """A term and its sample."""

    term: str
    sampled: int
    """Positives in the sketch; the sample has fewer if a data set lacks images without the term."""
    sample: Sample


def assign_folds(origins: NDArray[np.uint64], folds: int) -> NDArray[np.int64]:
    """The fold [2n] that holds out each sample, positives before negatives; samples of an origin share their fold.

    Large origins are placed first, each into the fold with the fewest samples of its sides so far.
    """
    half = len(origins) // 2
    names, places = np.unique(origins, return_inverse=True)
    counts = np.stack([np.bincount(side, minlength=len(names)) for side in (places[:half], places[half:])])
    load, fold = [[0] * folds, [0] * folds], np.zeros(len(names), np.int64)
    for place in np.argsort(-counts.sum(axis=0), kind="stable").tolist():
        left, right = counts[:, place].tolist()
        lightest = min(range(folds), key=lambda f: left * load[0][f] + right * load[1][f])
        fold[place] = lightest
        load[0][lightest] += left
        load[1][lightest] += right
    return fold[places]


def choose_samples(bucket: pa.Table, pools: Pools, folds: int, seed: int) -> Iterator[TermSample]:
    """The samples of every term of a merged bucket, terms ascending."""
    if not bucket.num_rows:
        return
    bucket = bucket.sort_by([(name, "ascending") for name in _ORDER])
    vectors, units = vectors_of(bucket), bucket["unit_hash"].to_numpy()
    keys, datasets, origins = (bucket[name].to_numpy() for name in ("key", "dataset", "origin"))
    starts = np.nonzero(np.append(True, keys[1:] != keys[:-1]))[0]
    places = pc.index_in(pa.array(keys[starts], pa.string()), value_set=pools.terms).to_pylist()
    for start, stop, place in zip(starts, np.append(starts[1:], len(keys)), places, strict=True):
        has = pools.rows[:0] if place is None else pools.rows_of(place)
        own, sides, held_out = datasets[start:stop], [], []
        for name in sorted(set(own)):
            mine = np.nonzero(own == name)[0] + start
            others = pools.without(keys[start], has, units[start:stop], dataset=name, count=len(mine), seed=seed)
            mine = mine[: len(others)]
            sides.append((mine, others))
            held_out.append(pools.origins_of(name, origins[mine], units[mine]))
        left, right = (np.concatenate(side) for side in zip(*sides, strict=True))
        fold = assign_folds(np.concatenate([*held_out, pools.origins[right]]), folds)
        yield TermSample(str(keys[start]), int(stop - start), Sample(vectors[left], pools.vectors[right], fold))


def first_by_hash(rows: pa.Table, count: int, seed: int) -> pa.Table:
    """Up to ``count`` of the rows, chosen and ordered by the hash of their image id."""
    keys = mix_keys(stable_keys(rows["image_id"].to_pylist()), seed, "validation")
    return rows.take(np.argsort(keys, kind="stable")[:count])
