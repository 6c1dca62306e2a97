"""Clusters of terms, interests, and labels of training images: ``clusters.parquet``, ``image_labels.parquet``,
``classes.json``, ``polysemy.parquet``.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.duplicates.dedup import keep_training
from lookalike.data.interests import labelling
from lookalike.data.interests.clusters import CLUSTERS, carry_over, cluster_terms
from lookalike.data.interests.polysemy import SENSES, count_senses, describe_senses, separated
from lookalike.data.interests.taxonomy import InterestClassifier, choose_interests, read_taxonomy, votes
from lookalike.data.interests.term_embedders import embed_terms
from lookalike.data.parts import Item, add_up, blocks_of, broadcast, part_name, read_table, write_table
from lookalike.data.steps.exchange import read_part
from lookalike.data.steps.job import LabelJob
from lookalike.data.text.annotations import ANNOTATIONS
from lookalike.errors import UsageError


def cluster(job: LabelJob) -> dict[str, Any]:
    """Write ``clusters.parquet`` of the dictionary's terms and, in the work folder, clusters and votes of all terms."""
    config, seed = job.config.clusters, job.config.seed
    dictionary = read_table(job.out.path("dictionary.parquet"))
    if job.config.dictionary.restrict:
        dictionary = dictionary.filter(pc.equal(dictionary["status"], "kept"))
    visible = dictionary["term"].to_pylist()
    if not visible:
        settings = job.config.dictionary
        at = "the chosen boundary" if settings.boundary_from else f"dictionary.boundary={settings.boundary}"
        raise UsageError(
            f"no term of {len(job.vocabulary())} is concrete at {at}; set a lower dictionary.boundary, or "
            "give more images or better embeddings"
        )
    classifier = InterestClassifier(read_taxonomy(config.interests.taxonomy), config.interests.embedder)
    terms = sorted(job.vocabulary())
    vectors = embed_terms(config.interests.embedder, terms)
    probabilities = classifier.probabilities(terms, vectors)
    interests_of = choose_interests(probabilities, config.interests)
    place = {term: row for row, term in enumerate(terms)}

    def clusters_of(some: list[str]) -> pa.Table:
        rows = [place[term] for term in some]
        own = [interests_of[row] for row in rows]
        return cluster_terms(some, vectors[rows], own, interests=classifier.interests, config=config, seed=seed)

    previous, next_id = CLUSTERS.empty_table(), 0
    if job.previous is not None:
        previous = read_table(job.previous.path("clusters.parquet"))
        next_id = int(job.previous.stats["next_cluster"])
    renamed = carry_over(clusters_of(visible), previous, next_id, config.carry_over)
    write_table(job.out.path("clusters.parquet"), renamed.clusters)
    write_table(job.out.work("all_clusters.parquet"), clusters_of(terms))
    flat = pa.array(votes(probabilities).reshape(-1), pa.float32())
    table = pa.table({"term": terms, "vote": pa.FixedSizeListArray.from_arrays(flat, len(classifier.interests))})
    write_table(job.out.work("votes.parquet"), table)
    return {
        "terms": len(visible),
        "clusters": len(renamed.clusters["cluster"].unique()),
        "polysemous_terms": sum(len(interests_of[place[term]]) > 1 for term in visible),
        "carried_over": renamed.carried,
        "next_cluster": renamed.next_id,
        "interests": classifier.interests,
    }


def assign(job: LabelJob, interests: list[str]) -> dict[str, Any]:
    """Write ``image_labels.parquet/part-*`` and ``classes.json``; return the statistics of the labels."""
    out, minimum = job.out, job.config.min_images_per_label
    counts = _assign_parts(job, interests)
    columns = labelling.choose_classes(counts, minimum)
    totals = _number_parts(job, columns)
    images, labelled = (totals.get(("images", name), 0) for name in ("all", "labelled"))
    per_label = [totals.get(("label", str(column)), 0) for column in range(len(columns))]
    clusters, all_clusters = _clusters(job)
    classes = labelling.describe_classes(clusters, columns, per_label, _previous_labels(job))
    out.write_json("classes.json", classes)
    visible = len(clusters["term"].unique())
    terms = dict(zip(labelling.VARIANTS, (len(all_clusters["term"].unique()), visible, visible), strict=True))
    return {
        "images": images,
        "labelled_images": labelled,
        "labels": len(columns),
        "label_count": sum(per_label),
        "labels_per_image": round(sum(per_label) / max(labelled, 1), 3),
        "interests": {name: count for (kind, name), count in totals.items() if kind == "interest"},
        "ablation": labelling.ablation_rows(counts, images, minimum, terms),
    }


def assign_none(job: LabelJob) -> dict[str, Any]:
    """Write ``image_labels.parquet/part-*`` without a label, and an empty ``classes.json``; count the kept images."""
    labels, dropped = job.out.path("image_labels.parquet"), job.out.path("duplicates.parquet")

    def task(item: Item) -> pa.Table:
        name = part_name(item["number"])
        rows = keep_training(read_table(item["uri"], ["image_id", "split"]), read_table(storage.join(dropped, name)))
        nothing: list[list[int]] = [[]] * rows.num_rows
        write_table(storage.join(labels, name), pa.table([rows["image_id"], nothing, nothing], labelling.IMAGE_LABELS))
        return pa.table([["images"], ["all"], [rows.num_rows]], labelling.LABEL_TOTALS)

    total = add_up(blocks_of(job.map(job.parts, task)), ["kind", "name"], labelling.LABEL_TOTALS)
    job.out.write_json("classes.json", [])
    return {"images": int(pc.sum(total["count"]).as_py() or 0), "labelled_images": 0, "labels": 0}


def _assign_parts(job: LabelJob, interests: list[str]) -> pa.Table:
    shared, dropped = broadcast(_tables(job, interests)), job.out.path("duplicates.parquet")
    text, work, borrowed = job.out.path("annotations.parquet"), job.out.work("assigned"), job.out.work("borrowed")
    counted, columns = job.out.work("counted"), ["image_id", "group", "dataset", "split", "interactions"]

    def task(item: Item) -> pa.Table:
        name = part_name(item["number"])
        if storage.exists(storage.join(counted, name)):  # written last, so an earlier attempt finished this part
            return read_table(storage.join(counted, name))
        rows = keep_training(read_table(item["uri"], columns), read_table(storage.join(dropped, name)))
        annotations = read_table(storage.join(text, name))
        lent = read_part(borrowed, item["number"], ANNOTATIONS)
        assigned, counts = labelling.assign_part(pa.concat_tables([annotations, lent]), rows, shared())
        write_table(storage.join(work, name), assigned)
        write_table(storage.join(counted, name), counts)
        return counts

    return add_up(blocks_of(job.map(job.parts, task)), ["variant", "cluster"], labelling.LABEL_COUNTS)


def _number_parts(job: LabelJob, columns: dict[int, int]) -> dict[tuple[str, str], int]:
    """Write ``image_labels.parquet``; return its ``LABEL_TOTALS`` by kind and name."""
    work, labels = job.out.work("assigned"), job.out.path("image_labels.parquet")

    def task(item: Item) -> pa.Table:
        name = part_name(item["number"])
        target = storage.join(labels, name)
        if not storage.exists(target):
            write_table(target, labelling.number_part(read_table(storage.join(work, name)), columns))
        return labelling.count_labels(read_table(target))

    totals = add_up(blocks_of(job.map(job.parts, task)), ["kind", "name"], labelling.LABEL_TOTALS)
    return {(row["kind"], row["name"]): row["count"] for row in totals.to_pylist()}


def tell_senses(job: LabelJob) -> dict[str, Any]:
    """Write ``polysemy.parquet``: on how many images each sense of a polysemous term was kept or removed."""
    blocks = blocks_of(job.map(job.work_items("assigned"), lambda item: count_senses(read_table(item["uri"]))))
    senses = describe_senses(add_up(blocks, ["term", "interest"], SENSES))
    write_table(job.out.path("polysemy.parquet"), senses)
    apart = separated(senses, job.config.report.min_images_per_sense)
    return {"terms": len(senses["term"].unique()), "separated": len(apart)}


def _tables(job: LabelJob, interests: list[str]) -> labelling.LabelTables:
    table = read_table(job.out.work("votes.parquet"))
    values = np.stack(table["vote"].to_numpy(zero_copy_only=False)).astype(np.float32)
    voting = dict(zip(table["term"].to_pylist(), values, strict=True))
    clusters, all_clusters = _clusters(job)
    return labelling.make_tables(voting, clusters, all_clusters, interests, job.config.restriction)


def _clusters(job: LabelJob) -> tuple[pa.Table, pa.Table]:
    """``CLUSTERS`` of the dictionary and of the whole vocabulary."""
    return read_table(job.out.path("clusters.parquet")), read_table(job.out.work("all_clusters.parquet"))


def _previous_labels(job: LabelJob) -> dict[int, int]:
    """Cluster -> its column among the classes of the previous run."""
    if job.previous is None:
        return {}
    return {entry["cluster"]: entry["label"] for entry in job.previous.read_json("classes.json")}
