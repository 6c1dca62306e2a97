"""The visual dictionary: which terms can be seen in a picture (Pinterest section 3.2.1).

Each term gets up to P positives and as many random negatives (``sketch``). A small classifier is trained on them
(``concreteness``); the share of held-out samples that it gets right is the concreteness of the term. Negatives come
from the same data sets as the positives, otherwise every word of a catalogue would look concrete beside another kind of
picture. All pictures of one creator are held out together, otherwise the name of an icon set would look concrete. Terms
under the boundary are dropped; the boundary is given, or chosen by a criterion (``boundary``).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from lookalike.config import Config, runtime
from lookalike.data.dictionary.boundary import BoundaryConfig
from lookalike.data.dictionary.sketch import Sample, SampleConfig
from lookalike.intervals import wilson_intervals

FORMAT = 2  # raised when the same samples and settings give other scores, so that earlier scores are not reused

DICTIONARY = pa.schema(
    [
        ("term", pa.string()),
        ("images", pa.int64()),
        ("positives", pa.int32()),
        ("trials", pa.int32()),
        ("hits", pa.int32()),
        ("concreteness", pa.float32()),
        ("low", pa.float32()),
        ("high", pa.float32()),
        ("status", pa.string()),
        ("digest", pa.string()),
    ]
)
"""One row per term of the vocabulary. ``status``: ``kept``, ``abstract`` (under the boundary) or ``too_few`` (positives
or negatives: not scored, ``concreteness`` is null). ``digest``: of everything that the score follows from."""
SCORES = pa.schema([*map(DICTIONARY.field, ("term", "positives", "trials", "hits", "digest")), ("reused", pa.bool_())])
"""One row per sampled term: positives, held-out answers, right answers; no digest if too few images were sampled."""


class ProbeConfig(Config):
    """The classifier of one term."""

    hidden: int = Field(16, ge=1, le=1024)
    """Hidden units."""
    folds: int = Field(3, ge=2, le=20)
    """Cross-validation folds."""
    steps: int = Field(10, ge=1, le=10_000)
    """Full-batch AdamW steps. More of them fit the samples rather than the term."""
    learning_rate: float = Field(0.02, gt=0, le=1)
    """Learning rate of AdamW."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Weight decay of AdamW."""


class DictionaryConfig(SampleConfig):
    """Sampling, classifier and decision of the visual dictionary."""

    boundary: float = Field(0.65, ge=0.5, le=1)
    """Concreteness under which a term is dropped. A kept term's Wilson interval must also lie above chance, 0.5."""
    boundary_from: BoundaryConfig | None = None
    """How to choose the boundary; ``boundary`` is then ignored."""
    restrict: bool = True
    """Keep only the terms that can be seen. False keeps all terms, which are scored nevertheless (an ablation)."""
    probe: ProbeConfig = ProbeConfig()
    terms_per_task: int = runtime(128, ge=1, le=10_000)
    """Terms whose samples are in one file and whose classifiers train in one task."""
    num_gpus: float = runtime(0.0, ge=0, le=1)
    """GPUs, or a share of a GPU, for each task that trains classifiers; 0 trains on the CPU."""


def digest(sample: Sample, config: ProbeConfig, seed: int) -> str:
    """32 hex digits of everything that a score follows from: vectors in order, folds, settings and seed.

    The vectors stand for the images and for the model that embedded them.
    """
    settings = json.dumps([FORMAT, config.identity(), seed, sample.positives.shape], sort_keys=True)
    result = hashlib.sha256(settings.encode())  # the fastest hash of hashlib on processors with SHA instructions
    for values, kind in zip(sample, ("<f2", "<f2", "<i8"), strict=True):
        result.update(np.ascontiguousarray(values, dtype=kind).tobytes())
    return result.hexdigest()[:32]


def merge_scores(vocabulary: Mapping[str, int], scores: pa.Table) -> pa.Table:
    """``DICTIONARY`` without ``status``, sorted by term.

    ``vocabulary``: term -> training images; ``scores``: ``SCORES`` of the sampled terms.
    """
    terms = pa.array(sorted(vocabulary), pa.string())
    places = pc.index_in(terms, value_set=scores["term"].combine_chunks())
    rows = scores.take(places)
    positives, trials, hits = (rows[name].fill_null(0).to_numpy() for name in ("positives", "trials", "hits"))
    low, high = wilson_intervals(hits, trials)
    ratios = [pa.array(values, pa.float32(), mask=trials == 0) for values in (hits / np.maximum(trials, 1), low, high)]
    images = pa.array([vocabulary[term] for term in terms.to_pylist()], pa.int64())
    columns: list[Any] = [terms, images, positives, trials, hits, *ratios, rows["digest"]]
    return pa.table(columns, schema=pa.schema([field for field in DICTIONARY if field.name != "status"]))


def decide(scored: pa.Table, boundary: float) -> pa.Table:
    """``DICTIONARY``: the result of ``merge_scores`` with the status of each term at ``boundary``."""
    concreteness, low = (scored[name].fill_null(0).to_numpy() for name in ("concreteness", "low"))
    kept = (concreteness >= np.float32(boundary)) & (low > 0.5)
    status = np.where(kept, "kept", np.where(scored["trials"].to_numpy() > 0, "abstract", "too_few"))
    return scored.append_column("status", pa.array(status, pa.string())).select(DICTIONARY.names)
