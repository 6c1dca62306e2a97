"""Labels of images: from annotations to cluster ids to the columns of a classifier.

Labels are counted for three variants of the pipeline, the rows of the paper's Table 2: clusters of all terms, clusters
of the terms in the visual dictionary, and the latter restricted to the interests of the image.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
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
"""Images of each cluster in each variant of the pipeline."""
LABEL_TOTALS = pa.schema([("kind", pa.string()), ("name", pa.string()), ("count", pa.int64())])
"""Images in all and with a label (kind ``images``: ``all``, ``labelled``), of each label (its column) and interest."""
ASSIGNED = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("clusters", pa.list_(pa.int32())),
        pa.field("interests", pa.list_(pa.string())),
        pa.field("senses", pa.list_(pa.struct([("term", pa.string()), ("interests", pa.list_(pa.string()))]))),
    ]
)
"""One row per kept training image: clusters after restriction, interests, and its polysemous terms."""
IMAGE_LABELS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("interests", pa.list_(pa.string())),
    ]
)
"""One row per kept training image: columns of the classifier (maybe none) and its interests."""


class LabelTables(NamedTuple):
    """Lookup tables that every part needs; all of dictionary size, broadcast once."""

    voting: dict[str, NDArray[np.float32]]
    """Term of the whole vocabulary -> its vote over the interests."""
    clusters: dict[str, list[int]]
    """Term of the visual dictionary -> its clusters."""
    all_clusters: dict[str, list[int]]
    """Term of the whole vocabulary -> its clusters, for the variant without a dictionary."""
    interest_of: dict[int, int]
    """Cluster -> number of its interest."""
    senses: dict[str, list[int]]
    """Polysemous term of the whole vocabulary -> numbers of its interests."""
    interests: list[str]
    restriction: RestrictionConfig


def make_tables(
    voting: dict[str, NDArray[np.float32]],
    clusters: pa.Table,
    all_clusters: pa.Table,
    interests: list[str],
    restriction: RestrictionConfig,
) -> LabelTables:
    """``LabelTables`` from the ``CLUSTERS`` of the dictionary and those of the whole vocabulary."""
    interest_of = {row["cluster"]: interests.index(row["interest"]) for row in clusters.to_pylist()}
    senses: dict[str, set[int]] = {}
    for row in all_clusters.to_pylist():
        senses.setdefault(row["term"], set()).add(interests.index(row["interest"]))
    several = {term: sorted(own) for term, own in senses.items() if len(own) > 1}
    return LabelTables(voting, _by_term(clusters), _by_term(all_clusters), interest_of, several, interests, restriction)


def _by_term(clusters: pa.Table) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for row in clusters.to_pylist():
        grouped.setdefault(row["term"], []).append(row["cluster"])
    return grouped


def terms_of_images(annotations: pa.Table, image_ids: list[str]) -> list[dict[str, float]]:
    """Term -> score of each image, the highest score if a term has several."""
    frame = pl.DataFrame(annotations.select(["image_id", "term", "score"]))
    best = frame.group_by("image_id", "term").agg(pl.col("score").max())
    terms: dict[str, dict[str, float]] = {image_id: {} for image_id in image_ids}
    for image_id, term, score in best.filter(pl.col("image_id").is_in(list(image_ids))).iter_rows():
        terms[image_id][term] = score
    return [terms[image_id] for image_id in image_ids]


def assign_part(annotations: pa.Table, rows: pa.Table, tables: LabelTables) -> tuple[pa.Table, pa.Table]:
    """``ASSIGNED`` of the images in ``rows``, and their ``LABEL_COUNTS``.

    ``rows`` has ``image_id`` and, if the corpus has it, ``interactions``; ``annotations`` may include other images.
    """
    counts: dict[str, Counter[int]] = {variant: Counter() for variant in VARIANTS}
    ids = rows["image_id"].to_pylist()
    interactions = rows["interactions"].to_pylist() if "interactions" in rows.column_names else [None] * len(ids)
    assigned = []
    for image_id, terms, signals in zip(ids, terms_of_images(annotations, ids), interactions, strict=True):
        everything = map_clusters(list(terms), tables.all_clusters)
        visual = map_clusters(list(terms), tables.clusters)
        own = _interests(terms, signals, tables)
        restricted = restrict(visual, tables.interest_of, own)
        for variant, clusters in zip(VARIANTS, (everything, visual, restricted), strict=True):
            counts[variant].update(clusters)
        names, senses = [tables.interests[i] for i in own], senses_of(list(terms), own, tables)
        assigned.append({"image_id": image_id, "clusters": restricted, "interests": names, "senses": senses})
    counted = [
        {"variant": variant, "cluster": cluster, "images": images}
        for variant, per_cluster in counts.items()
        for cluster, images in sorted(per_cluster.items())
    ]
    return pa.Table.from_pylist(assigned, schema=ASSIGNED), pa.Table.from_pylist(counted, schema=LABEL_COUNTS)


def _interests(terms: dict[str, float], signals: list[dict[str, Any]] | None, tables: LabelTables) -> NDArray[np.int64]:
    config = tables.restriction
    if config.share == 0:  # no restriction: the image has every interest
        return np.arange(len(tables.interests))
    evidence = interaction_evidence(signals, tables.voting, config.interaction_weight)
    return image_interests([*terms.items(), *evidence], tables.voting, config.share)


def senses_of(terms: list[str], own: NDArray[np.int64], tables: LabelTables) -> list[dict[str, Any]]:
    """Each polysemous term of an image, with the interests that term and image share."""
    image = set(own.tolist())
    return [
        {"term": term, "interests": [tables.interests[i] for i in tables.senses[term] if i in image]}
        for term in sorted(terms)
        if term in tables.senses
    ]


def choose_classes(counts: pa.Table, min_images: int) -> dict[int, int]:
    """Cluster -> column, for the clusters with at least ``min_images`` images after all steps."""
    frame = pl.DataFrame(counts).filter((pl.col("variant") == VARIANTS[-1]) & (pl.col("images") >= min_images))
    return {cluster: column for column, cluster in enumerate(frame["cluster"].sort().to_list())}


def describe_classes(
    clusters: pa.Table, columns: dict[int, int], images: Sequence[int], previous: Mapping[int, int]
) -> list[dict[str, Any]]:
    """The entries of ``classes.json``: one per column, in order.

    ``previous``: cluster -> its column in the classifier of the previous run. ``previous_label`` names the column whose
    weights a label can take over; None: it has to start afresh.
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
    """``IMAGE_LABELS``: clusters replaced by their columns; clusters without a column are dropped."""
    labels = [[columns[c] for c in clusters if c in columns] for clusters in assigned["clusters"].to_pylist()]
    return pa.table([assigned["image_id"], labels, assigned["interests"]], schema=IMAGE_LABELS)


def count_labels(numbered: pa.Table) -> pa.Table:
    """``LABEL_TOTALS`` of a part; parts add up."""
    labelled = pc.sum(pc.greater(pc.list_value_length(numbered["labels"]), 0)).as_py() or 0
    rows = [("images", "all", numbered.num_rows), ("images", "labelled", labelled)]
    for kind, column in (("label", "labels"), ("interest", "interests")):
        values = pc.value_counts(pc.list_flatten(numbered[column])).to_pylist()
        rows += [(kind, str(entry["values"]), entry["counts"]) for entry in values]
    return pa.Table.from_pylist([dict(zip(LABEL_TOTALS.names, row, strict=True)) for row in rows], LABEL_TOTALS)


def ablation_rows(counts: pa.Table, images: int, min_images: int, terms: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the paper's Table 2: per variant its terms, labels (clusters with enough images) and labels per image."""
    frame = pl.DataFrame(counts)
    rows = []
    for variant in VARIANTS:
        labels = frame.filter((pl.col("variant") == variant) & (pl.col("images") >= min_images))
        rows.append(
            {
                "variant": variant,
                "terms": terms[variant],
                "labels": labels.height,
                "labels_per_image": round(float(labels["images"].sum()) / max(images, 1), 3),
            }
        )
    return rows
