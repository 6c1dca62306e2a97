"""Steps 3 and 4 applied to images: annotations to cluster ids to the columns of a classifier.

Labels are counted for three variants of the pipeline, the rows of the paper's Table 2: all terms clustered, only the
terms of the visual dictionary, and those restricted to the image's interests.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike.data.interests.restriction import (
    RestrictionConfig,
    image_interests,
    interaction_evidence,
    map_clusters,
    restrict,
)

VARIANTS = ("annotation clustering", "+ visual dictionary", "+ interest restriction")
LABEL_COUNTS = pa.schema([("variant", pa.string()), ("cluster", pa.int32()), ("images", pa.int64())])
ASSIGNED = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("clusters", pa.list_(pa.int32())),
        pa.field("interests", pa.list_(pa.string())),
        pa.field("senses", pa.list_(pa.struct([("term", pa.string()), ("interests", pa.list_(pa.string()))]))),
    ]
)
"""One row a training image that was kept: clusters after restriction, interests, and its polysemous terms."""
IMAGE_LABELS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("interests", pa.list_(pa.string())),
    ]
)
"""One row a training image that was kept: columns of the classifier (may be empty) and its interests."""


class LabelTables(NamedTuple):
    """What every part needs; all of dictionary size, broadcast once."""

    voting: dict[str, NDArray[np.float32]]
    """Term -> its vote over the interests, of the whole vocabulary."""
    clusters: dict[str, list[int]]
    """Term -> clusters, terms of the visual dictionary."""
    all_clusters: dict[str, list[int]]
    """Term -> clusters of the whole vocabulary, the variant without a dictionary."""
    interest_of: dict[int, int]
    """Cluster -> number of its interest."""
    senses: dict[str, list[int]]
    """Polysemous term of the whole vocabulary -> numbers of its interests."""
    interests: list[str]
    restriction: RestrictionConfig


def make_tables(
    voting: dict[str, NDArray[np.float32]],
    clusters: pa.Table,
    everything: pa.Table,
    interests: list[str],
    restriction: RestrictionConfig,
) -> LabelTables:
    """``LabelTables`` from the ``CLUSTERS`` of the dictionary and of the whole vocabulary."""
    interest_of = {row["cluster"]: interests.index(row["interest"]) for row in clusters.to_pylist()}
    senses: dict[str, set[int]] = {}
    for row in everything.to_pylist():
        senses.setdefault(row["term"], set()).add(interests.index(row["interest"]))
    several = {term: sorted(own) for term, own in senses.items() if len(own) > 1}
    return LabelTables(voting, _by_term(clusters), _by_term(everything), interest_of, several, interests, restriction)


def _by_term(clusters: pa.Table) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in clusters.to_pylist():
        found.setdefault(row["term"], []).append(row["cluster"])
    return found


def terms_of_images(annotations: pa.Table, kept: Sequence[str]) -> list[dict[str, float]]:
    """Term -> score of each image in ``kept``; of several scores for a term the highest counts."""
    frame = pl.DataFrame(pl.from_arrow(annotations.select(["image_id", "term", "score"])))
    best = frame.group_by("image_id", "term").agg(pl.col("score").max())
    found: dict[str, dict[str, float]] = {image_id: {} for image_id in kept}
    for image_id, term, score in best.filter(pl.col("image_id").is_in(list(kept))).iter_rows():
        found[image_id][term] = score
    return [found[image_id] for image_id in kept]


def assign_part(annotations: pa.Table, rows: pa.Table, tables: LabelTables) -> tuple[pa.Table, pa.Table]:
    """``ASSIGNED`` of the images in ``rows`` and their ``LABEL_COUNTS``.

    ``rows`` has ``image_id`` and, where the corpus has it, ``interactions``; ``annotations`` may hold other images too.
    """
    counts: dict[str, Counter[int]] = {variant: Counter() for variant in VARIANTS}
    kept = rows["image_id"].to_pylist()
    signals = rows["interactions"].to_pylist() if "interactions" in rows.column_names else [None] * len(kept)
    assigned = []
    for image_id, terms, own_signals in zip(kept, terms_of_images(annotations, kept), signals, strict=True):
        visual = map_clusters(list(terms), tables.clusters)
        own = _interests(terms, own_signals, tables)
        restricted = restrict(visual, tables.interest_of, own)
        everything = map_clusters(list(terms), tables.all_clusters)
        for variant, clusters in zip(VARIANTS, (everything, visual, restricted), strict=True):
            counts[variant].update(clusters)
        assigned.append(
            {
                "image_id": image_id,
                "clusters": restricted,
                "interests": [tables.interests[i] for i in own],
                "senses": senses_of(terms, own, tables),
            }
        )
    counted = [
        {"variant": variant, "cluster": cluster, "images": images}
        for variant, found in counts.items()
        for cluster, images in sorted(found.items())
    ]
    return pa.Table.from_pylist(assigned, schema=ASSIGNED), pa.Table.from_pylist(counted, schema=LABEL_COUNTS)


def _interests(terms: dict[str, float], signals: list[dict[str, Any]] | None, tables: LabelTables) -> NDArray[np.int64]:
    asked = tables.restriction
    if asked.share == 0:  # no restriction: every interest is the image's
        return np.arange(len(tables.interests))
    used = interaction_evidence(signals, tables.voting, asked.interaction_weight)
    return image_interests([*terms.items(), *used], tables.voting, asked.share)


def senses_of(terms: Iterable[str], own: NDArray[np.int64], tables: LabelTables) -> list[dict[str, Any]]:
    """Each polysemous term of an image with those of its interests that are the image's too."""
    image = set(own.tolist())
    return [
        {"term": term, "interests": [tables.interests[i] for i in tables.senses[term] if i in image]}
        for term in sorted(terms)
        if term in tables.senses
    ]


def choose_classes(counts: pa.Table, min_images: int) -> dict[int, int]:
    """Cluster -> column, for the clusters that at least ``min_images`` images have after all steps."""
    frame = pl.DataFrame(pl.from_arrow(counts)).filter(
        (pl.col("variant") == VARIANTS[-1]) & (pl.col("images") >= min_images)
    )
    return {cluster: column for column, cluster in enumerate(frame["cluster"].sort().to_list())}


def describe_classes(
    clusters: pa.Table, columns: dict[int, int], images: Sequence[int], previous: Mapping[int, int]
) -> list[dict[str, Any]]:
    """One entry a column, in order: what ``classes.json`` says of a label.

    ``previous`` maps a cluster to its column in the previous run's classifier: ``previous_label`` says which weights a
    column can take over (None: it starts afresh).
    """
    members: dict[int, list[dict[str, Any]]] = {}
    for row in clusters.to_pylist():
        members.setdefault(row["cluster"], []).append(row)
    entries = []
    for cluster, column in columns.items():
        interest, terms = members[cluster][0]["interest"], [row["term"] for row in members[cluster]]
        entries.append(
            {
                "label": column,
                "cluster": cluster,
                "interest": interest,
                "terms": terms,
                "name": f"{interest}: {', '.join(terms[:3])}",
                "images": images[column],
                "previous_label": previous.get(cluster),
            }
        )
    return entries


def number_part(assigned: pa.Table, columns: dict[int, int]) -> pa.Table:
    """``IMAGE_LABELS``: cluster ids replaced by columns, those without one dropped."""
    labels = [[columns[c] for c in clusters if c in columns] for clusters in assigned["clusters"].to_pylist()]
    values = [
        assigned["image_id"].combine_chunks(),
        pa.array(labels, pa.list_(pa.int32())),
        assigned["interests"].combine_chunks(),
    ]
    return pa.table(values, schema=IMAGE_LABELS)


def count_labels(numbered: pa.Table, num_classes: int) -> NDArray[np.int64]:
    """[classes + 3]: images of each class, then images, images with a label, and labels in all. Parts add up."""
    labels = numbered["labels"].combine_chunks()
    flat = labels.flatten().to_numpy(zero_copy_only=False)
    lengths = labels.value_lengths().to_numpy(zero_copy_only=False)
    tail = [len(lengths), int((lengths > 0).sum()), len(flat)]
    return np.concatenate([np.bincount(flat, minlength=num_classes), tail]).astype(np.int64)


def count_interests(numbered: pa.Table) -> list[dict[str, Any]]:
    """Images of each interest: ``values`` (name) and ``counts``. Parts add up."""
    return list(pc.value_counts(numbered["interests"].combine_chunks().flatten()).to_pylist())


def ablation_rows(counts: pa.Table, images: int, min_images: int, terms: dict[str, int]) -> list[dict[str, Any]]:
    """The paper's Table 2 form: per variant its terms, labels (clusters with enough images) and labels an image."""
    frame = pl.DataFrame(pl.from_arrow(counts))
    rows = []
    for variant in VARIANTS:
        found = frame.filter((pl.col("variant") == variant) & (pl.col("images") >= min_images))
        rows.append(
            {
                "variant": variant,
                "terms": terms[variant],
                "labels": found.height,
                "labels_per_image": round(float(found["images"].sum()) / max(images, 1), 3),
            }
        )
    return rows
