"""Clusters, interests and the labels of training images: ``clusters.parquet``, ``image_labels/``, ``classes.json``."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data import assignment
from lookalike.data.annotations import ANNOTATIONS
from lookalike.data.clusters import InterestClassifier, cluster_terms, read_taxonomy
from lookalike.data.dedup import keep_training
from lookalike.data.parts import Item, blocks_of, broadcast, part_name, read_table, write_table
from lookalike.data.steps.job import LabelJob
from lookalike.errors import UsageError


def cluster(job: LabelJob) -> dict[str, Any]:
    """``clusters.parquet`` of the dictionary's terms; the work folder gets the clusters of all terms."""
    config, seed = job.config.clusters, job.config.seed
    classifier = InterestClassifier(read_taxonomy(config.taxonomy), config.embedder)
    dictionary = read_table(job.out.path("dictionary.parquet"))
    kept = dictionary.filter(pc.equal(dictionary["status"], "kept"))["term"].to_pylist()
    if not kept:
        raise UsageError(f"no term of {dictionary.num_rows} is concrete at dictionary.boundary="
                         f"{job.config.dictionary.boundary}; lower it, or give more images or better embeddings")
    clusters = cluster_terms(kept, classifier, config, seed)
    write_table(job.out.path("clusters.parquet"), clusters)
    terms = sorted(job.vocabulary())
    write_table(job.out.work("all_clusters.parquet"), cluster_terms(terms, classifier, config, seed))
    flat = pa.array(classifier.probabilities(terms).reshape(-1), pa.float32())
    table = pa.table({"term": terms, "p": pa.FixedSizeListArray.from_arrays(flat, len(classifier.interests))})
    write_table(job.out.work("interests.parquet"), table)
    return {"terms": len(kept), "clusters": max(clusters["cluster"].to_pylist()) + 1,
            "interests": classifier.interests}  # fmt: skip


def assign(job: LabelJob, interests: list[str]) -> dict[str, Any]:
    """``image_labels.parquet/part-*`` and ``classes.json``; counts for the ablation."""
    out, minimum = job.out, job.config.min_images_per_label
    borrowed = pa.concat_tables([ANNOTATIONS.empty_table(), *map(read_table, job.work_parts("borrowed"))])
    shared = broadcast((_tables(job, interests), read_table(out.path("duplicates.parquet")), borrowed))
    text = out.path("annotations.parquet")

    def assign(item: Item) -> pa.Table:
        tables, duplicates, lent = shared()
        rows = keep_training(read_table(item["uri"], ["image_id", "group", "dataset", "split"]), duplicates)
        annotations = read_table(storage.join(text, part_name(item["number"])))
        both = pa.concat_tables([annotations, lent])
        assigned, counts = assignment.assign_part(both, rows["image_id"].to_pylist(), tables)
        write_table(storage.join(work, part_name(item["number"])), assigned)
        return counts

    work = out.work("assigned")
    blocks = [assignment.LABEL_COUNTS.empty_table(), *blocks_of(job.map(job.parts, assign))]
    merged = pa.concat_tables(blocks).group_by(["variant", "cluster"]).aggregate([("images", "sum")])
    counts = merged.rename_columns(assignment.LABEL_COUNTS.names).cast(assignment.LABEL_COUNTS)
    columns = assignment.choose_classes(counts, minimum)

    def number(item: Item) -> pa.Table:
        assigned = read_table(storage.join(work, part_name(item["number"])))
        numbered = assignment.number_part(assigned, columns)
        write_table(storage.join(out.uri, "image_labels.parquet", part_name(item["number"])), numbered)
        return pa.table({"counts": [assignment.count_labels(numbered, len(columns)).tolist()]})

    totals = np.sum([b["counts"][0].as_py() for b in blocks_of(job.map(job.parts, number))], axis=0)
    images, labelled, labels = (int(value) for value in totals[len(columns) :])
    clusters, everything = _clusters(job)
    out.write_json("classes.json", assignment.describe_classes(clusters, columns, totals[: len(columns)].tolist()))
    kept = len(clusters["term"].unique())
    terms = dict(zip(assignment.VARIANTS, (len(everything["term"].unique()), kept, kept), strict=True))
    return {"images": images, "labelled_images": labelled, "labels": len(columns), "label_count": labels,
            "labels_per_image": round(labels / max(labelled, 1), 3),
            "ablation": assignment.ablation_rows(counts, images, minimum, terms)}  # fmt: skip


def _tables(job: LabelJob, interests: list[str]) -> assignment.Tables:
    table = read_table(job.out.work("interests.parquet"))
    values = np.stack(table["p"].to_numpy(zero_copy_only=False)).astype(np.float32)
    probabilities = dict(zip(table["term"].to_pylist(), values, strict=True))
    clusters, everything = _clusters(job)
    return assignment.make_tables(probabilities, clusters, everything, interests, job.config.restriction.share)


def _clusters(job: LabelJob) -> tuple[pa.Table, pa.Table]:
    return read_table(job.out.path("clusters.parquet")), read_table(job.out.work("all_clusters.parquet"))
