"""Step 2, the visual dictionary: which terms can be seen in a picture (Pinterest section 3.2.1).

Per term up to P positives and as many random negatives are sampled in one pass, by bottom-k sketches that merge in any
order; no row moves. A unit (a product, or an image without one) gives one sample at most, so that views of a product
never stand on both sides of the hold-out. Negatives come from the same data sets as the positives: else every word of
one catalogue would look concrete beside another kind of picture.
"""

from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.sampling import mix_keys, stable_keys

POOL = "\x00"  # sketch keys that start so hold a data set's random images, the others a term's positives

SKETCH = pa.schema([
    pa.field("key", pa.string()), pa.field("unit_hash", pa.uint64()), pa.field("image_hash", pa.uint64()),
    pa.field("image_id", pa.string()), pa.field("dataset", pa.string()), pa.field("terms", pa.list_(pa.string())),
])  # fmt: skip
DICTIONARY = pa.schema([
    ("term", pa.string()), ("images", pa.int64()), ("positives", pa.int32()), ("trials", pa.int32()),
    ("hits", pa.int32()), ("concreteness", pa.float32()), ("low", pa.float32()), ("high", pa.float32()),
    ("status", pa.string()),
])  # fmt: skip
"""One row a term of the vocabulary. ``status``: ``kept``, ``abstract`` (under the boundary), ``too_few`` (positives or
negatives: not scored, ``concreteness`` is null)."""


class ProbeConfig(Config):
    """The classifier of one term."""

    hidden: int = Field(16, ge=1, le=1024)
    """Hidden units."""
    folds: int = Field(3, ge=2, le=20)
    """Cross-validation folds."""
    steps: int = Field(60, ge=1, le=10_000)
    """Full-batch AdamW steps."""
    learning_rate: float = Field(0.02, gt=0, le=1)
    """Of AdamW."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Of AdamW."""


class Questions(NamedTuple):
    """Samples of several terms, padded to one length: all arrays are [T, S]."""

    rows: NDArray[np.int64]
    """Row of the feature table; -1 is padding."""
    target: NDArray[np.float32]
    """1 for a positive, 0 for a negative."""
    fold: NDArray[np.int64]
    """The fold in which a sample is held out."""


class DictionaryConfig(Config):
    """Sampling, classifier and decision of the visual dictionary."""

    positives: int = Field(96, ge=4, le=10_000)
    """P: positives sampled a term at the most, and as many negatives."""
    pool: int = Field(2048, ge=16, le=1_000_000)
    """Random images of each data set that negatives are taken from."""
    min_units: int = Field(6, ge=2)
    """Positives (and negatives) from different products or images below which a term is not scored."""
    boundary: float = Field(0.65, ge=0.5, le=1)
    """Concreteness under which a term goes. A kept term's Wilson interval must also lie above chance, one half."""
    probe: ProbeConfig = ProbeConfig()
    terms_per_task: int = Field(128, ge=1, le=10_000)
    """Terms whose classifiers train as one batch."""


def sketch_part(annotations: pa.Table, rows: pa.Table, config: DictionaryConfig, high: float, seed: int) -> pa.Table:
    """``SKETCH`` of a part: ``rows`` (image_id, group, dataset) are its kept training rows.

    ``annotations`` holds the terms of the part; those at ``high`` or above make their images positives.
    """
    frame = pl.DataFrame(pl.from_arrow(rows.select(["image_id", "group", "dataset"])))
    unit = frame["group"].fill_null(frame["image_id"])
    frame = frame.with_columns(
        unit_hash=pl.Series(mix_keys(stable_keys(unit.to_list()), seed, "unit"), dtype=pl.UInt64),
        image_hash=pl.Series(mix_keys(stable_keys(frame["image_id"].to_list()), seed, "image"), dtype=pl.UInt64),
    )
    named = pl.DataFrame(pl.from_arrow(annotations.select(["image_id", "term", "score"])))
    least = float(np.float32(high))  # scores are stored in single precision
    terms = named.group_by("image_id").agg(terms=pl.col("term").sort())
    pool = frame.join(terms, on="image_id", how="left").with_columns(key=POOL + pl.col("dataset"))
    positive = named.filter(pl.col("score") >= least).join(frame, on="image_id").with_columns(
        key=pl.col("term"), terms=pl.lit(None, pl.List(pl.String)))  # fmt: skip
    both = pl.concat([pool.select(SKETCH.names), positive.select(SKETCH.names)])
    return _bottom(both, config).to_arrow().cast(SKETCH)


def merge_sketches(first: pa.Table, second: pa.Table, config: DictionaryConfig) -> pa.Table:
    """The sketch of both parts: associative, commutative, and equal to the sketch of their union."""
    frames = [pl.DataFrame(pl.from_arrow(table)) for table in (first, second)]
    return _bottom(pl.concat(frames), config).to_arrow().cast(SKETCH)


def _bottom(frame: pl.DataFrame, config: DictionaryConfig) -> pl.DataFrame:
    one_a_unit = frame.sort("key", "unit_hash", "image_hash", "image_id").unique(
        ["key", "unit_hash"], keep="first", maintain_order=True)  # fmt: skip
    limit = pl.when(pl.col("key").str.starts_with(POOL)).then(config.pool).otherwise(config.positives)
    return one_a_unit.filter(pl.int_range(pl.len()).over("key") < limit)


class Samples:
    """The terms that have enough samples, as padded arrays, in chunks of similar length."""

    def __init__(self, sketch: pa.Table, vocabulary: list[str], config: DictionaryConfig, seed: int) -> None:
        self.config = config
        frame = pl.DataFrame(pl.from_arrow(sketch))
        pools = frame.filter(pl.col("key").str.starts_with(POOL))
        by_term = {key[0]: group for key, group in frame.group_by("key", maintain_order=True)}
        self._pools = {key[len(POOL) :]: _Pool(by_term[key]) for key in pools["key"].unique().sort().to_list()}
        self.positives: dict[str, int] = {}
        self.chosen: dict[str, tuple[list[str], list[str]]] = {}
        for term in vocabulary:
            found = by_term.get(term)
            self.positives[term] = 0 if found is None else found.height
            if found is None or found.height < config.min_units:
                continue
            pair = self._choose(term, found, seed)
            if len(pair[0]) >= config.min_units:
                self.chosen[term] = pair
        self.image_ids = sorted({image for pair in self.chosen.values() for side in pair for image in side})

    def _choose(self, term: str, found: pl.DataFrame, seed: int) -> tuple[list[str], list[str]]:
        positives, negatives = [], []
        for dataset in found["dataset"].unique().sort().to_list():
            images = found.filter(pl.col("dataset") == dataset)["image_id"].to_list()
            others = self._pools[dataset].without(term, len(images), seed) if dataset in self._pools else []
            positives += images[: len(others)]
            negatives += others
        return positives, negatives

    def chunks(self) -> list[list[str]]:
        """Terms by falling number of samples, cut into tasks: independent of workers."""
        terms = sorted(self.chosen, key=lambda term: (-len(self.chosen[term][0]), term))
        size = self.config.terms_per_task
        return [terms[start : start + size] for start in range(0, len(terms), size)]

    def questions(self, terms: list[str]) -> Questions:
        """The samples of ``terms`` as rows of the features of ``image_ids``."""
        place = {image: row for row, image in enumerate(self.image_ids)}
        width = max(2 * len(self.chosen[term][0]) for term in terms)
        index = np.full((len(terms), width), -1, np.int64)
        target, fold = np.zeros((len(terms), width), np.float32), np.zeros((len(terms), width), np.int64)
        for row, term in enumerate(terms):
            positives, negatives = self.chosen[term]
            half = len(positives)
            index[row, : 2 * half] = [place[image] for image in (*positives, *negatives)]
            target[row, :half] = 1
            fold[row, : 2 * half] = np.tile(np.arange(half) % self.config.probe.folds, 2)
        return Questions(index, target, fold)


class _Pool:
    def __init__(self, frame: pl.DataFrame) -> None:
        self._images = frame["image_id"].to_list()
        self._terms = [frozenset(terms or ()) for terms in frame["terms"].to_list()]
        self._keys = frame["image_hash"].to_numpy()

    def without(self, term: str, count: int, seed: int) -> list[str]:
        order = np.argsort(mix_keys(self._keys, seed, "negatives", term), kind="stable")
        fitting = (self._images[row] for row in order.tolist() if term not in self._terms[row])
        return [image for image, _ in zip(fitting, range(count), strict=False)]


def decide(vocabulary: dict[str, int], samples: Samples, hits: dict[str, int]) -> pa.Table:
    """``DICTIONARY``, sorted by term.

    ``vocabulary``: term -> training images; ``hits``: scored term -> right answers on held-out samples.
    """
    terms = sorted(vocabulary)
    trials = np.array([2 * len(samples.chosen[t][0]) if t in hits else 0 for t in terms], np.int32)
    right = np.array([hits.get(t, 0) for t in terms], np.int32)
    low, high = wilson_interval(right, trials)
    scored = trials > 0
    accuracy = right / np.maximum(trials, 1)
    kept = scored & (accuracy >= samples.config.boundary) & (low > 0.5)
    status = np.where(kept, "kept", np.where(scored, "abstract", "too_few"))
    counts = [[vocabulary[t] for t in terms], [samples.positives[t] for t in terms]]
    scores = [_nullable(values, scored) for values in (accuracy, low, high)]
    columns: list[Any] = [terms, *counts, trials, right, *scores, status]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, DICTIONARY, strict=True)], schema=DICTIONARY)


def _nullable(values: NDArray[Any], present: NDArray[np.bool_]) -> list[float | None]:
    return [float(value) if there else None for value, there in zip(values, present, strict=True)]


def wilson_interval(hits: NDArray[Any], trials: NDArray[Any], z: float = 1.96) -> tuple[NDArray[Any], NDArray[Any]]:
    """Wilson score interval of ``hits`` out of ``trials`` (arrays of one shape; 0 trials give 0 to 1)."""
    n = np.maximum(np.asarray(trials, float), 1e-9)
    p = np.asarray(hits, float) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    empty = np.asarray(trials) == 0
    return np.where(empty, 0.0, np.maximum(centre - half, 0)), np.where(empty, 1.0, np.minimum(centre + half, 1))
