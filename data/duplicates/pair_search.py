"""The near-duplicate search: cells of similar pictures, and all twins inside a cell.

A cell is a centroid of spherical k-means over a sample of the embeddings, or a bucket of equal pieces of hashes. A
picture is compared in its ``probes`` nearest cells and in ``hash_bands`` buckets. Inside a cell the search is exact: it
computes tiles of cosines and of hashes and verifies the pairs that could pass the rule. Memory is bounded by the tile
and by ``neighbours`` twins a row, however large a family of pictures is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from lookalike.data.duplicates.pdq import HASH_BITS
from lookalike.data.duplicates.twins import DedupConfig, Pictures, look_alike, measure, pictures_of
from lookalike.sampling import mix_keys
from lookalike.seeds import derive_seed

QUERY_TILE, BASE_TILE = 256, 8192  # rows of a tile: 8 MB of cosines
PAIR_BATCH = 65_536  # pairs verified at a time, about 1 kB each
ROUNDING = 1e-3  # more than a tile's cosine can differ from the one that the rule judges
SAMPLE_PER_CELL, MAX_SAMPLE = 64, 2_000_000  # vectors on which the cells are trained
FLAT_CELLS = 4096  # more centroids than this are looked up through a graph
MAX_CELL_ROWS = 400_000  # larger cells are cut by a hash of the PDQ hash

PAIRS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("twin", pa.int64(), nullable=False),
        pa.field("twin_id", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("same", pa.bool_()),
        pa.field("bits", pa.int32()),
        pa.field("cosine", pa.float32()),
    ]
)
"""A training row and its twin: an earlier training row (``split`` is null) or a row of the held-out ``split``."""


class TwinPairs(NamedTuple):
    """Verified pairs, as places [p] among the rows of a cell."""

    row: NDArray[np.int64]
    twin: NDArray[np.int64]
    same: NDArray[np.bool_]
    bits: NDArray[np.int32]
    cosine: NDArray[np.float32]

    def take(self, places: NDArray[Any]) -> "TwinPairs":
        return TwinPairs(*(values[places] for values in self))

    @staticmethod
    def join(parts: "Sequence[TwinPairs]") -> "TwinPairs":
        """The pairs of all ``parts``, at least one, in order."""
        columns: Any = zip(*parts, strict=True)
        return TwinPairs(*(np.concatenate(values) for values in columns))


def count_cells(rows: int, config: DedupConfig) -> int:
    """Number of cells for a corpus of ``rows`` images."""
    return 1 if rows <= config.exact_rows else -(-rows // config.cell_rows)


def sample_share(rows: int, cells: int) -> float:
    """Share of the images on which the cells are trained."""
    return min(1.0, min(SAMPLE_PER_CELL * cells, MAX_SAMPLE) / max(rows, 1))


def _lookup(dim: int, cells: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)  # several threads build a different graph each time
    if cells <= FLAT_CELLS:
        return faiss.IndexFlatIP(dim)
    index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    return index


def train_cells(sample: NDArray[np.float32], cells: int, seed: int) -> NDArray[np.float32]:
    """Centroids [min(cells, n), d] of the unit vectors ``sample`` [n, d], the same for the same seed."""
    import faiss

    count = min(cells, len(sample))
    clustering = faiss.Clustering(sample.shape[1], count)
    clustering.spherical, clustering.niter, clustering.seed = True, 10, derive_seed(seed, "cells") % (1 << 31)
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(sample)
    clustering.train(np.ascontiguousarray(sample), _lookup(sample.shape[1], count))
    return np.asarray(faiss.vector_to_array(clustering.centroids).reshape(count, -1), np.float32)


class Cells:
    """Looks up the nearest of some centroids."""

    def __init__(self, centroids: NDArray[np.float32], probes: int) -> None:
        self.probes = min(probes, len(centroids))
        self._index = _lookup(centroids.shape[1], len(centroids))
        self._index.add(centroids)
        self._centroids = centroids

    def nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Cells [n, probes] of unit vectors [n, d], the nearest first."""
        batches = [self._nearest(vectors[start : start + BASE_TILE]) for start in range(0, len(vectors), BASE_TILE)]
        return np.concatenate([np.zeros((0, self.probes), np.int64), *batches])

    def _nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        rough = self._index.search(vectors, min(self.probes + 2, len(self._centroids)))[1]
        rough = np.where(rough < 0, rough[:, :1], rough)  # a graph may find fewer cells: then one is named twice
        score = np.einsum("nd,nkd->nk", vectors, self._centroids[rough], dtype=np.float64)
        order = np.lexsort((rough, -score), axis=1)[:, : self.probes]  # double: the same order in every batch
        return np.asarray(np.take_along_axis(rough, order, axis=1), np.int64)


class CellKeys:
    """Keys of cells in a shuffle: one per cell, several for a cell of more than ``MAX_CELL_ROWS`` rows."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.cuts = np.maximum(1, -(-rows // MAX_CELL_ROWS))
        self.total = int(self.cuts.sum())
        self._first = np.cumsum(self.cuts) - self.cuts

    def of(self, cells: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The key [n, probes] of each row in each of its ``cells`` [n, probes]; ``hashes`` [n, 4] are PDQ hashes.

        Rows of equal hashes meet in the same cut of a cell.
        """
        mixed = hashes[:, 0]
        for word in hashes[:, 1:].T:
            mixed = mix_keys(mixed, 0, "cut") ^ word
        cut = (mix_keys(mixed, 0, "cut") >> np.uint64(1)).astype(np.int64)[:, None] % self.cuts[cells]
        return np.asarray(self._first[cells] + cut, np.int64)


def band_keys(
    hashes: NDArray[np.uint64], sharp: NDArray[np.bool_], first: int, buckets: int, bands: int
) -> NDArray[np.int64]:
    """Keys [n, bands] of the first ``bands`` 16-bit pieces of ``hashes`` [n, 4].

    Each band has ``buckets`` keys; the smallest is ``first``. A picture whose hash is not sharp gets the key -1: it
    forms no hash pairs.
    """
    pieces = np.ascontiguousarray(hashes).view(np.uint16)[:, :bands].astype(np.uint64)
    keys = (mix_keys(pieces, 0, "band") % np.uint64(buckets)).astype(np.int64) + first + buckets * np.arange(bands)
    return np.where(sharp[:, None], keys, -1)


def search_cell(rows: pa.Table, config: DedupConfig) -> pa.Table:
    """``PAIRS`` of the signatures of a cell: each training row's earliest training twins and its closest held-out twin.

    Between rows that both have a group only equal bytes count, unless one is held out.
    """
    rows = rows.sort_by("row")
    pictures = pictures_of(rows, config.mirrored)
    split = np.array(rows["split"].to_pylist(), dtype=object)
    grouped = rows["group"].is_valid().to_numpy()
    training, held_out = np.nonzero(split == "train")[0], np.nonzero(split != "train")[0]
    earlier = _earlier_twins(pictures, training, grouped, config)
    parts = [*earlier, *_closest_twins(pictures, training, held_out, config)]
    if not parts:
        return PAIRS.empty_table()
    pairs = TwinPairs.join(parts)
    ids, numbers = rows["image_id"].combine_chunks(), rows["row"].to_numpy()
    sides = [column for side in (pairs.row, pairs.twin) for column in (numbers[side], ids.take(pa.array(side)))]
    splits = [value if value != "train" else None for value in split[pairs.twin]]
    return pa.table([*sides, splits, pairs.same, pairs.bits, pairs.cosine], schema=PAIRS)


def _earlier_twins(
    pictures: Pictures, training: NDArray[Any], grouped: NDArray[np.bool_], config: DedupConfig
) -> Iterator[TwinPairs]:
    for start in range(0, len(training), QUERY_TILE):
        queries = training[start : start + QUERY_TILE]
        twins = np.zeros(len(pictures.quality), np.int64)  # twins remembered so far, per row
        for base in _tiles(training[: start + QUERY_TILE]):
            pairs = _compare(pictures, queries, base, config)
            both_grouped = grouped[pairs.row] & grouped[pairs.twin]
            pairs = pairs.take((pairs.twin < pairs.row) & (pairs.same | ~both_grouped))
            pairs = pairs.take(_rank(pairs.row) + twins[pairs.row] < config.neighbours)
            if len(pairs.row):
                twins += np.bincount(pairs.row, minlength=len(twins))
                yield pairs
            queries = queries[twins[queries] < config.neighbours]
            if not len(queries):
                break


def _closest_twins(
    pictures: Pictures, training: NDArray[Any], held_out: NDArray[Any], config: DedupConfig
) -> Iterator[TwinPairs]:
    for start in range(0, len(training), QUERY_TILE):
        best: TwinPairs | None = None
        for base in _tiles(held_out):
            pairs = _compare(pictures, training[start : start + QUERY_TILE], base, config)
            if best is not None:
                pairs = TwinPairs.join([best, pairs])
            pairs = pairs.take(np.lexsort((pairs.twin, -pairs.cosine, pairs.bits, pairs.row)))
            best = pairs.take(_rank(pairs.row) == 0)
        if best is not None and len(best.row):
            yield best


def _tiles(places: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(places), BASE_TILE):
        yield places[start : start + BASE_TILE]


def _rank(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place [p] of each entry among the entries of its row, which stand together."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # row numbers are not negative
    return np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))


def _compare(pictures: Pictures, queries: NDArray[Any], base: NDArray[Any], config: DedupConfig) -> TwinPairs:
    """Verified pairs of a tile, by query and then by base."""
    row, twin = np.divmod(_candidates(pictures, queries, base, config), len(base))
    row, twin = queries[row], base[twin]
    batches = [slice(start, start + PAIR_BATCH) for start in range(0, max(len(row), 1), PAIR_BATCH)]
    return TwinPairs.join([_verify(pictures, row[batch], twin[batch], config) for batch in batches])


def _verify(pictures: Pictures, row: NDArray[Any], twin: NDArray[Any], config: DedupConfig) -> TwinPairs:
    distances = measure(pictures, row, twin, config)
    good = (row != twin) & (distances.same | look_alike(distances, config))
    bits = np.minimum(distances.bits, distances.trimmed_bits)
    return TwinPairs(row, twin, distances.same, bits, distances.cosine).take(good)


def _candidates(
    pictures: Pictures, queries: NDArray[Any], base: NDArray[Any], config: DedupConfig
) -> NDArray[np.int64]:
    """Flat places in a tile, ascending, of the pairs that could pass the rule: by cosine or by hash without margins."""
    floor = np.float32(min(config.min_cosine, config.sure_cosine) - ROUNDING)
    product = pictures.vectors[queries] @ pictures.vectors[base].T
    places = [np.flatnonzero(product.ravel() >= floor)]
    sharp = pictures.quality[:, 1] >= config.min_quality
    rows, columns = np.flatnonzero(sharp[queries]), np.flatnonzero(sharp[base])
    for hashes in (pictures.hashes, pictures.mirrors)[: 1 + bool(len(pictures.mirrors))]:
        row, column = _near_hashes(pictures.hashes[queries[rows], 1], hashes[base[columns], 1], config.trimmed_bits)
        places.append(rows[row] * len(base) + columns[column])
    return np.unique(np.concatenate(places))


def _near_hashes(
    queries: NDArray[np.uint64], hashes: NDArray[np.uint64], bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place in ``queries`` [n, 4], place in ``hashes`` [m, 4]) of all pairs that differ in up to ``bits`` bits."""
    import faiss

    index = faiss.IndexBinaryFlat(HASH_BITS)
    index.add(np.ascontiguousarray(hashes).view(np.uint8))
    limits, _, near = index.range_search(np.ascontiguousarray(queries).view(np.uint8), bits + 1)
    edges = limits.astype(np.int64)
    counts: NDArray[np.int64] = edges[1:] - edges[:-1]
    return np.repeat(np.arange(len(queries)), counts), np.asarray(near, np.int64)


def merge_pairs(pairs: pa.Table) -> pl.DataFrame:
    """``PAIRS`` of several cells as one frame, as if they came from one cell.

    Each pair of training rows comes once, by row and twin; of the held-out twins of a row the closest stays (by bits,
    then cosine, then corpus order).
    """
    frame = pl.DataFrame(pairs)
    inside = frame.filter(pl.col("split").is_null()).sort("row", "twin", "bits").unique(["row", "twin"], keep="first")
    across = frame.filter(pl.col("split").is_not_null()).sort("row", "bits", -pl.col("cosine"), "twin")
    return pl.concat([inside, across.unique("row", keep="first")]).sort("row", "twin")
