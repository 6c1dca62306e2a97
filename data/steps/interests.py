"""Clusters, interests and the labels of training images: ``clusters.parquet``, ``image_labels/``, ``classes.json``."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike import storage
from lookalike.data.duplicates.dedup import keep_training
from lookalike.data.interests import labelling
from lookalike.data.interests.clusters import carry_over, cluster_terms
from lookalike.data.interests.polysemy import SENSES, count_senses, describe_senses, separated
from lookalike.data.interests.taxonomy import InterestClassifier, choose_interests, read_taxonomy, votes
from lookalike.data.interests.term_embedders import embed_terms
from lookalike.data.parts import (
    Item,
    add_up,
    blocks_of,
    broadcast,
    part_items,
    part_name,
    read_table,
    write_table,
)
from lookalike.data.steps.exchange import read_part
from lookalike.data.steps.job import LabelJob
from lookalike.data.text.annotations import ANNOTATIONS
from lookalike.errors import UsageError


def cluster(job: LabelJob) -> dict[str, Any]:
    """``clusters.parquet`` of the dictionary's terms; the work folder gets clusters and votes of all terms."""
    config, seed = job.config.clusters, job.config.seed
    dictionary = read_table(job.out.path("dictionary.parquet"))
    if job.config.dictionary.restrict:
        dictionary = dictionary.filter(pc.equal(dictionary["status"], "kept"))
    kept = dictionary["term"].to_pylist()
    if not kept:
        asked = job.config.dictionary
        at = f"dictionary.boundary={asked.boundary}" if asked.boundary_from is None else "the boundary that was chosen"
        raise UsageError(
            f"no term of {len(job.vocabulary())} is concrete at {at}; set a lower dictionary.boundary, or "
            "give more images or better embeddings"
        )
    classifier = InterestClassifier(read_taxonomy(config.interests.taxonomy), config.interests.embedder)
    terms = sorted(job.vocabulary())
    vectors = embed_terms(config.interests.embedder, terms)
    probabilities = classifier.probabilities(terms, vectors)
    chosen = choose_interests(probabilities, config.interests)
    place = {term: row for row, term in enumerate(terms)}

    def clusters_of(some: list[str]) -> pa.Table:
        rows = [place[term] for term in some]
        return cluster_terms(
            some, vectors[rows], [chosen[row] for row in rows], interests=classifier.interests, config=config, seed=seed
        )

    clusters, next_id, carried = _carry_over(job, clusters_of(kept))
    write_table(job.out.path("clusters.parquet"), clusters)
    write_table(job.out.work("all_clusters.parquet"), clusters_of(terms))
    flat = pa.array(votes(probabilities).reshape(-1), pa.float32())
    table = pa.table({"term": terms, "vote": pa.FixedSizeListArray.from_arrays(flat, len(classifier.interests))})
    write_table(job.out.work("votes.parquet"), table)
    several = sum(len(chosen[place[term]]) > 1 for term in kept)
    return {
        "terms": len(kept),
        "clusters": len(clusters["cluster"].unique()),
        "polysemous_terms": several,
        "carried_over": carried,
        "next_cluster": next_id,
        "interests": classifier.interests,
    }


def _carry_over(job: LabelJob, clusters: pa.Table) -> tuple[pa.Table, int, int]:
    """``clusters`` with ids of the previous run's where they continue; the first unused id; how many continue."""
    first = len(clusters["cluster"].unique())
    if job.previous is None:
        return clusters, first, 0
    before = read_table(job.previous.path("clusters.parquet"))
    next_id = int(job.previous.stats["next_cluster"])
    clusters, first = carry_over(clusters, before, next_id, job.config.clusters.carry_over)
    return clusters, first, sum(cluster < next_id for cluster in clusters["cluster"].unique().to_pylist())


def assign(job: LabelJob, interests: list[str]) -> dict[str, Any]:
    """``image_labels.parquet/part-*`` and ``classes.json``; counts for the ablation."""
    out, minimum = job.out, job.config.min_images_per_label
    counts = _assign_parts(job, interests)
    columns = labelling.choose_classes(counts, minimum)
    totals, own = _number_parts(job, columns)
    images, labelled, labels = (int(value) for value in totals[len(columns) :])
    clusters, everything = _clusters(job)
    out.write_json(
        "classes.json",
        labelling.describe_classes(clusters, columns, totals[: len(columns)].tolist(), _previous_labels(job)),
    )
    kept = len(clusters["term"].unique())
    terms = dict(zip(labelling.VARIANTS, (len(everything["term"].unique()), kept, kept), strict=True))
    return {
        "images": images,
        "labelled_images": labelled,
        "labels": len(columns),
        "label_count": labels,
        "labels_per_image": round(labels / max(labelled, 1), 3),
        "interests": dict(sorted(own.items())),
        "ablation": labelling.ablation_rows(counts, images, minimum, terms),
    }


def _assign_parts(job: LabelJob, interests: list[str]) -> pa.Table:
    shared, dropped = broadcast(_tables(job, interests)), job.out.path("duplicates.parquet")
    text, work, borrowed = job.out.path("annotations.parquet"), job.out.work("assigned"), job.out.work("borrowed")
    counted, columns = job.out.work("counted"), ["image_id", "group", "dataset", "split", "interactions"]

    def task(item: Item) -> pa.Table:
        name = part_name(item["number"])
        if storage.exists(storage.join(counted, name)):  # written last: an earlier attempt finished this part
            return read_table(storage.join(counted, name))
        rows = keep_training(read_table(item["uri"], columns), read_table(storage.join(dropped, name)))
        annotations = read_table(storage.join(text, name))
        lent = read_part(borrowed, item["number"], ANNOTATIONS)
        assigned, counts = labelling.assign_part(pa.concat_tables([annotations, lent]), rows, shared())
        write_table(storage.join(work, name), assigned)
        write_table(storage.join(counted, name), counts)
        return counts

    return add_up(blocks_of(job.map(job.parts, task)), ["variant", "cluster"], labelling.LABEL_COUNTS)


def _number_parts(job: LabelJob, columns: dict[int, int]) -> tuple[NDArray[np.int64], Counter[str]]:
    work, labels = job.out.work("assigned"), job.out.path("image_labels.parquet")

    def task(item: Item) -> pa.Table:
        target = storage.join(labels, part_name(item["number"]))
        if storage.exists(target):
            numbered = read_table(target)
        else:
            assigned = read_table(storage.join(work, part_name(item["number"])))
            numbered = labelling.number_part(assigned, columns)
            write_table(target, numbered)
        counts = labelling.count_labels(numbered, len(columns)).tolist()
        return pa.table({"counts": [counts], "interests": [labelling.count_interests(numbered)]})

    totals, own = np.zeros(len(columns) + 3, np.int64), Counter[str]()
    for block in blocks_of(job.map(job.parts, task)):
        totals += np.sum(block["counts"].to_pylist(), axis=0, dtype=np.int64)
        for found in block["interests"].to_pylist():
            own.update({entry["values"]: entry["counts"] for entry in found})
    return totals, own


def tell_senses(job: LabelJob) -> dict[str, Any]:
    """``polysemy.parquet``: how the images of each polysemous term were told apart."""
    items = part_items(job.work_parts("assigned"))
    blocks = blocks_of(job.map(items, lambda item: count_senses(read_table(item["uri"]))))
    senses = describe_senses(add_up(blocks, ["term", "interest"], SENSES))
    write_table(job.out.path("polysemy.parquet"), senses)
    apart = separated(senses, job.config.report.min_images_per_sense)
    return {"terms": len(senses["term"].unique()), "separated": len(apart)}


def _tables(job: LabelJob, interests: list[str]) -> labelling.LabelTables:
    table = read_table(job.out.work("votes.parquet"))
    values = np.stack(table["vote"].to_numpy(zero_copy_only=False)).astype(np.float32)
    voting = dict(zip(table["term"].to_pylist(), values, strict=True))
    clusters, everything = _clusters(job)
    return labelling.make_tables(voting, clusters, everything, interests, job.config.restriction)


def _clusters(job: LabelJob) -> tuple[pa.Table, pa.Table]:
    return read_table(job.out.path("clusters.parquet")), read_table(job.out.work("all_clusters.parquet"))


def _previous_labels(job: LabelJob) -> dict[int, int]:
    """Cluster -> column of the previous run's classes."""
    if job.previous is None:
        return {}
    return {entry["cluster"]: entry["label"] for entry in job.previous.read_json("classes.json")}
