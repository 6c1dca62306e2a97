"""Samples of every term in one pass: bottom-k sketches that merge in any order, so that no row has to move.

A key's sketch is its units with the smallest hashes: a term's sketch samples its positives, that of a data set (its key
starts with ``POOL``) random images, from which negatives are taken. A unit (a product, or an image without one) gives
one sample at most, so that views of a product never stand on both sides of a hold-out. Nor do pictures of one origin
(creator): a word that one icon set alone uses is told by the set's style, whatever it means. A row carries the image's
vector from the first cut on: nothing is looked up afterwards.

Where many tasks sketch, most of what each keeps is cut again when sketches meet. ``find_limits`` on a first, light pass
(keys and hashes alone) gives the largest hash that each sketch will hold; with these limits the second pass passes on
little more than the samples themselves. The result is the same with or without.
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

POOL = "\x00"  # sketch keys that start so hold a data set's random images, the others a term's positives
MERGE_ROWS = 1 << 16  # rows of sketches that wait before they are cut
LARGE_SHARE = 1 / 3  # a creator of more of a data set is no origin in it: what all share tells nothing apart

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
"""Columns of a sketch, beside ``vector`` where the rows had one. ``origin``: hash of what is held out as one, the
creator, or else the unit. ``terms``: all of the image's, in pools only."""
LIMITS = pa.schema([("key", pa.string()), ("limit", pa.uint64())])
_ORDER = ["key", "unit_hash", "image_hash", "image_id"]


class SampleConfig(Config):
    """How many images a term and a data set are judged by."""

    positives: int = Field(96, ge=4, le=10_000)
    """P: positives sampled a term at the most, and as many negatives."""
    pool: int = Field(2048, ge=16, le=1_000_000)
    """Random images of each data set that negatives are taken from."""
    pool_total: int = Field(65_536, ge=16, le=10_000_000)
    """Random images of all data sets together: with many data sets each gets less. Every task holds these."""
    min_units: int = Field(6, ge=2)
    """Positives (and negatives) from different products or images below which a term is not scored."""
    hold_out_creators: bool = True
    """Hold out the pictures of a creator as one: what tells a term must hold for other creators' pictures."""

    def pool_size(self, datasets: int) -> int:
        """Random images of each of so many data sets; ``min_units`` at the least."""
        return max(self.min_units, min(self.pool, self.pool_total // max(datasets, 1)))


def sketch_part(
    annotations: pa.Table, rows: pa.Table, config: SampleConfig, *, high: float, seed: int, limits: pa.Table | None
) -> pa.Table:
    """Sketch of a part: ``rows`` (image_id, group, dataset, creator; vector if wanted) are its kept training rows.

    ``annotations`` holds the terms of the part; those at ``high`` or above make their images positives. ``limits``
    (``LIMITS``): rows of a key with a larger unit hash are left out.
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
    kept = _cut(both, config)
    terms = named.join(frame, on="image_id").group_by("row").agg(terms=pl.col("term").sort())
    kept = kept.join(terms, on="row", how="left", maintain_order="left").with_columns(
        terms=pl.when(pl.col("key").str.starts_with(POOL)).then("terms")
    )
    told = (frame[name].gather(kept["row"]) for name in ("dataset", "origin"))
    table = kept.select(*_ORDER, *told, "terms").to_arrow().cast(SKETCH)
    if "vector" in rows.column_names:
        table = table.append_column("vector", rows["vector"].combine_chunks().take(kept["row"].to_arrow()))
    return table


def _hashed(rows: pa.Table, by_creator: bool, seed: int) -> pl.DataFrame:
    """Number of each row with its data set and the hashes of its unit, image and origin."""
    frame = pl.DataFrame(rows.select(["image_id", "group", "dataset", "creator"]))
    unit = frame["group"].fill_null(frame["image_id"])
    units = mix_keys(stable_keys(unit.to_list()), seed, "unit")
    images = mix_keys(stable_keys(frame["image_id"].to_list()), seed, "image")
    creators = mix_keys(stable_keys(frame["creator"].fill_null("").to_list()), seed, "origin")
    known = (frame["creator"].fill_null("") != "").to_numpy() & by_creator
    hashes = {"unit_hash": units, "image_hash": images, "origin": np.where(known, creators, units)}
    return frame.with_columns(
        row=pl.int_range(pl.len(), dtype=pl.Int64),
        **{name: pl.Series(values, dtype=pl.UInt64) for name, values in hashes.items()},
    )


def _cut(frame: pl.DataFrame, config: SampleConfig) -> pl.DataFrame:
    """One row a unit of a key, and of these the first by hash, as many as the key may have; in order of ``_ORDER``.

    The bound of a pool falls with the number of data sets seen, so a part never cuts what the whole would keep.
    """
    one_a_unit = frame.sort(_ORDER).unique(["key", "unit_hash"], keep="first", maintain_order=True)
    pool = pl.col("key").str.starts_with(POOL)
    datasets = one_a_unit.filter(pool)["key"].n_unique()
    limit = pl.when(pool).then(config.pool_size(datasets)).otherwise(config.positives)
    return one_a_unit.filter(pl.int_range(pl.len()).over("key") < limit)


def merge_sketches(tables: Sequence[pa.Table], config: SampleConfig) -> pa.Table:
    """The sketch of all parts: associative, commutative, and equal to the sketch of their union."""
    table = pa.concat_tables(tables)
    frame = pl.DataFrame(table.select(_ORDER)).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    return table.take(_cut(frame, config)["row"].to_arrow()).combine_chunks()


def merge_all(tables: Iterable[pa.Table], config: SampleConfig) -> pa.Table:
    """``merge_sketches`` of tables that come one by one, at least one; memory: twice the sketch, and ``MERGE_ROWS``."""
    merged: list[pa.Table] = []
    waiting = 0
    for table in tables:
        merged.append(table)
        waiting += table.num_rows
        if waiting > MERGE_ROWS + merged[0].num_rows:
            merged, waiting = [merge_sketches(merged, config)], 0
    return merge_sketches(merged, config)


def find_limits(units: pa.Table, config: SampleConfig) -> pa.Table:
    """``LIMITS`` of the keys in ``units`` (key, unit_hash; a whole bucket): the last hash that their sketch will hold.

    Keys with fewer units than they may have get no limit.
    """
    frame = pl.DataFrame(units.select(["key", "unit_hash"])).unique().sort("key", "unit_hash")
    pool = pl.col("key").str.starts_with(POOL)
    datasets = frame.filter(pool)["key"].n_unique()
    last = pl.when(pool).then(config.pool_size(datasets)).otherwise(config.positives) - 1
    found = frame.filter(pl.int_range(pl.len()).over("key") == last).rename({"unit_hash": "limit"})
    return found.to_arrow().cast(LIMITS)


def buckets_of(keys: pa.ChunkedArray | pa.Array, buckets: int) -> NDArray[np.int64]:
    """The bucket of each key: a term's by its hash, below ``buckets``; all pools share bucket ``buckets``."""
    coded = pl.Series(pl.from_arrow(keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys))
    names = coded.unique().sort()
    numbers = (stable_keys(names.to_list()) % np.uint64(buckets)).astype(np.int64)
    numbers[names.str.starts_with(POOL).to_numpy()] = buckets
    places = pc.index_in(keys, value_set=names.to_arrow()).to_numpy()
    return np.asarray(numbers[places], dtype=np.int64)


class Pools:
    """Random images of each data set with their terms, as flat arrays that tasks share without copying.

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
        """What to hold out as one for images of ``dataset``: ``origins``, or the unit where the origin is large."""
        large = self._large.get(dataset)
        return origins if large is None else np.where(np.isin(origins, large), units, origins)

    def rows_of(self, place: int) -> NDArray[np.integer]:
        """Pool rows of the images that have the term at ``place`` of ``terms``."""
        return self.rows[self.ends[place - 1] if place else 0 : self.ends[place]]

    def without(
        self, term: str, has: NDArray[np.integer], units: NDArray[np.uint64], *, dataset: str, count: int, seed: int
    ) -> NDArray[np.int64]:
        """Rows of up to ``count`` random images of ``dataset`` that are not among ``has`` and not of ``units``."""
        start, stop = self._spans.get(dataset, (0, 0))
        fitting = ~np.isin(self.units[start:stop], units)
        fitting[has[(has >= start) & (has < stop)] - start] = False
        rows = np.nonzero(fitting)[0] + start
        keys = mix_keys(self.images[rows], seed, "negatives", term)
        return np.asarray(rows[np.argsort(keys, kind="stable")[:count]], dtype=np.int64)


class Sample(NamedTuple):
    """The images that a term is judged by, as feature vectors; both sides hold as many, of the same data sets."""

    positives: NDArray[np.float16]
    """[n, D]"""
    negatives: NDArray[np.float16]
    """[n, D]"""
    folds: NDArray[np.int64]
    """[2n]: the fold that holds an image out, positives first."""


class TermSample(NamedTuple):
    """A term and its images."""

    term: str
    sampled: int
    """Positives in the sketch; the sample has less where a data set lacks images without the term."""
    sample: Sample


def assign_folds(origins: NDArray[np.uint64], folds: int) -> NDArray[np.int64]:
    """The fold [2n] that holds out each sample, positives before negatives: one for all samples of an origin.

    Large origins are placed first, each into the fold that holds least of its sides so far.
    """
    half = len(origins) // 2
    names, places = np.unique(origins, return_inverse=True)
    counts = np.stack([np.bincount(side, minlength=len(names)) for side in (places[:half], places[half:])])
    load, fold = [[0] * folds, [0] * folds], np.zeros(len(names), np.int64)
    for place in np.argsort(-counts.sum(axis=0), kind="stable").tolist():
        left, right = counts[:, place].tolist()
        chosen = min(range(folds), key=lambda f: left * load[0][f] + right * load[1][f])
        fold[place] = chosen
        load[0][chosen] += left
        load[1][chosen] += right
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
        own, chosen, held = datasets[start:stop], [], []
        for name in sorted(set(own)):
            mine = np.nonzero(own == name)[0] + start
            others = pools.without(keys[start], has, units[start:stop], dataset=name, count=len(mine), seed=seed)
            mine = mine[: len(others)]
            chosen.append((mine, others))
            held.append(pools.origins_of(name, origins[mine], units[mine]))
        left, right = (np.concatenate(side) for side in zip(*chosen, strict=True))
        fold = assign_folds(np.concatenate([*held, pools.origins[right]]), folds)
        yield TermSample(str(keys[start]), int(stop - start), Sample(vectors[left], pools.vectors[right], fold))


def first_by_hash(rows: pa.Table, count: int, seed: int) -> pa.Table:
    """Up to ``count`` of the rows, chosen and ordered by the hash of their image id."""
    keys = mix_keys(stable_keys(rows["image_id"].to_pylist()), seed, "validation")
    return rows.take(np.argsort(keys, kind="stable")[:count])
