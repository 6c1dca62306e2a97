"""Step 2, the visual dictionary: which terms can be seen in a picture (Pinterest section 3.2.1).

Per term up to P positives and as many random negatives are sampled (``sketch``), a small classifier is trained on them
(``concreteness``), and the share of held-out samples that it gets right is the term's concreteness. Negatives come from
the same data sets as the positives: else every word of one catalogue would look concrete beside another kind of
picture. What one creator made is held out as one: else the name of an icon set would. Terms under the boundary go; it
is given, or chosen by a criterion (``boundary``).
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

Z = 1.96
"""Half width of a 95% interval in standard errors; part of what a dictionary says."""
FORMAT = 1  # raised when the same samples and settings give other scores: earlier scores are not reused then

SCORES = pa.schema(
    [
        pa.field("term", pa.string()),
        pa.field("positives", pa.int32()),
        pa.field("trials", pa.int32()),
        pa.field("hits", pa.int32()),
        pa.field("digest", pa.string()),
        pa.field("reused", pa.bool_()),
    ]
)
"""One row a sampled term: its positives, held-out answers, and right ones; no digest where too few were sampled."""
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
"""One row a term of the vocabulary. ``status``: ``kept``, ``abstract`` (under the boundary), ``too_few`` (positives or
negatives: not scored, ``concreteness`` is null). ``digest``: of all that the score follows from."""


class ProbeConfig(Config):
    """The classifier of one term."""

    hidden: int = Field(16, ge=1, le=1024)
    """Hidden units."""
    folds: int = Field(3, ge=2, le=20)
    """Cross-validation folds."""
    steps: int = Field(10, ge=1, le=10_000)
    """Full-batch AdamW steps. Few: more of them fit the samples and not the term."""
    learning_rate: float = Field(0.02, gt=0, le=1)
    """Of AdamW."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Of AdamW."""


class DictionaryConfig(SampleConfig):
    """Sampling, classifier and decision of the visual dictionary."""

    boundary: float = Field(0.65, ge=0.5, le=1)
    """Concreteness under which a term goes. A kept term's Wilson interval must also lie above chance, one half."""
    boundary_from: BoundaryConfig | None = None
    """How to choose the boundary instead; ``boundary`` is not used then."""
    restrict: bool = True
    """Keep only the terms that can be seen. False keeps all and scores them all the same (an ablation)."""
    probe: ProbeConfig = ProbeConfig()
    terms_per_task: int = runtime(128, ge=1, le=10_000)
    """Terms whose samples lie in one file and whose classifiers train in one task."""
    num_gpus: float = runtime(0.0, ge=0, le=1)
    """GPUs, or a share of one, of a task that trains classifiers; 0 trains on the CPU."""


def digest(sample: Sample, config: ProbeConfig, seed: int) -> str:
    """32 hex digits of all that a score follows from: the samples' vectors in order, their folds, settings and seed.

    The vectors stand for the images and for the model that embedded them.
    """
    settings = json.dumps([FORMAT, config.identity(), seed, sample.positives.shape], sort_keys=True)
    result = hashlib.sha256(settings.encode())  # the fastest of hashlib where the processor knows it
    for values, kind in zip(sample, ("<f2", "<f2", "<i8"), strict=True):
        result.update(np.ascontiguousarray(values, dtype=kind).tobytes())
    return result.hexdigest()[:32]


def merge_scores(vocabulary: Mapping[str, int], scores: pa.Table) -> pa.Table:
    """``DICTIONARY`` without ``status``, sorted by term.

    ``vocabulary``: term -> training images; ``scores``: ``SCORES`` of those of its terms that were sampled.
    """
    terms = pa.array(sorted(vocabulary), pa.string())
    places = pc.index_in(terms, value_set=scores["term"].combine_chunks())
    found = scores.take(places)
    positives, trials, hits = (found[name].fill_null(0).to_numpy() for name in ("positives", "trials", "hits"))
    low, high = wilson_intervals(hits, trials, Z)
    ratios = [pa.array(values, pa.float32(), mask=trials == 0) for values in (hits / np.maximum(trials, 1), low, high)]
    images = pa.array([vocabulary[term] for term in terms.to_pylist()], pa.int64())
    columns: list[Any] = [terms, images, positives, trials, hits, *ratios, found["digest"]]
    return pa.table(columns, schema=pa.schema([field for field in DICTIONARY if field.name != "status"]))


def decide(scored: pa.Table, boundary: float) -> pa.Table:
    """``DICTIONARY``: the terms of ``merge_scores`` with their status at ``boundary``."""
    concreteness, low = (scored[name].fill_null(0).to_numpy() for name in ("concreteness", "low"))
    kept = (concreteness >= np.float32(boundary)) & (low > 0.5)
    status = np.where(kept, "kept", np.where(scored["trials"].to_numpy() > 0, "abstract", "too_few"))
    return scored.append_column("status", pa.array(status, pa.string())).select(DICTIONARY.names)
