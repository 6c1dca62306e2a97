"""Stage ``labels``: noisy text to per-image labels in seven steps (Pinterest section 3.2.1 and DESIGN of this package).

This module only wires: each step is a pure function of another module, run on parts of the corpus by Ray Data, its
dictionary-sized results folded on the driver and broadcast. Near-duplicates are found first, although the paper lists
them last, so that copies of one picture cannot vouch for a term on both sides of a hold-out.

A step that is finished leaves a marker in the draft and is not run again; parts that are written are not redone.
"""

import json
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from lookalike import storage
from lookalike.cluster import ensure_ray
from lookalike.config import runtime
from lookalike.data import assignment
from lookalike.data.annotations import ANNOTATIONS, COUNTS, TEXT_COLUMNS, AnnotationConfig, annotate, count_candidates
from lookalike.data.clusters import ClusterConfig, InterestClassifier, cluster_terms, read_taxonomy
from lookalike.data.dedup import SIGNATURES, DedupConfig, borrow, find_duplicates, keep_training, sign_images
from lookalike.data.dictionary import SKETCH, DictionaryConfig, Samples, decide, merge_sketches, sketch_part
from lookalike.data.features import align, feature_schema, project_part
from lookalike.data.interests import RestrictionConfig
from lookalike.data.parts import (
    Item,
    blocks_of,
    broadcast,
    collect,
    map_parts,
    num_partitions,
    part_items,
    part_name,
    read_table,
    write_table,
)  # fmt: skip
from lookalike.data.report import ReportConfig, write_report
from lookalike.errors import UsageError
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import get_logger, timed

log = get_logger(__name__)
_DONE = pa.schema([("number", pa.int64())])


class LabelsConfig(StageConfig):
    """Settings of the seven steps."""

    annotations: AnnotationConfig = AnnotationConfig()
    dedup: DedupConfig = DedupConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    clusters: ClusterConfig = ClusterConfig()
    restriction: RestrictionConfig = RestrictionConfig()
    feature_dim: int = Field(128, ge=8, le=4096)
    """Size to which the frozen embeddings are projected for the dictionary and the duplicate search."""
    min_images_per_label: int = Field(8, ge=1)
    """Training images a cluster needs to become a class."""
    report: ReportConfig = ReportConfig()
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: as many as there are CPUs."""


class LabelJob:
    """One run of the stage over its draft."""

    def __init__(self, run: StageRun[LabelsConfig]) -> None:
        self.config, self.out = run.config, run.out
        self.corpus, self.embeddings = run.one("corpus"), run.one("embeddings")
        self.parts = part_items(self.corpus.files("part-", ".parquet"))

    def once(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's small result, from its marker when an earlier attempt finished it."""
        marker = self.out.work(f"{name}.json")
        if storage.exists(marker):
            return dict(json.loads(storage.read_bytes(marker)))
        with timed(log, "step", name=name) as more:
            result = step()
            more.update({key: value for key, value in result.items() if isinstance(value, (int, float))})
        storage.write_atomic(marker, json.dumps(result).encode())
        return result

    def map(self, items: list[Item], task: Callable[[Item], pa.Table]) -> Any:
        """``map_parts`` with the configured concurrency."""
        return map_parts(items, task, concurrency=self.config.concurrency)

    def prepare(self) -> dict[str, Any]:
        """Signatures of all images and small copies of all embeddings, as parts in the draft's work folder."""
        work, dim, seed = self.out.work(), self.config.feature_dim, self.config.seed
        vectors = part_items(self.embeddings.files("part-", ".parquet"))
        items = [{**item, "kind": "signatures"} for item in self.parts] + [{**i, "kind": "features"} for i in vectors]

        def task(item: Item) -> pa.Table:
            target = storage.join(work, item["kind"], part_name(item["number"]))
            if not storage.exists(target):
                if item["kind"] == "signatures":
                    table = sign_images(read_table(item["uri"], ["image_id", "image", "group", "split"]))
                else:
                    table = project_part(read_table(item["uri"], ["image_id", "vector"]), dim, seed)
                write_table(target, table)
            return pa.table([[item["number"]]], schema=_DONE)

        return {"parts": sum(block.num_rows for block in blocks_of(self.map(items, task)))}

    def work_parts(self, kind: str) -> list[str]:
        """URIs of the parts of a kind in the work folder, in order."""
        folder = self.out.work(kind)
        return [storage.join(folder, name) for name in storage.list_files(folder)] if storage.exists(folder) else []

    def dedup(self) -> dict[str, Any]:
        """``duplicates.parquet``: the training rows to drop. Holds one signature and one feature an image."""
        signatures = pa.concat_tables([SIGNATURES.empty_table(), *map(read_table, self.work_parts("signatures"))])
        features = pa.concat_tables([read_table(uri) for uri in self.work_parts("features")])
        vectors = align(features, signatures["image_id"].to_pylist())
        duplicates = find_duplicates(signatures, vectors, self.config.dedup)
        write_table(self.out.path("duplicates.parquet"), duplicates)
        reasons = duplicates.group_by("reason").aggregate([([], "count_all")]).to_pylist()
        splits = signatures.group_by("split").aggregate([([], "count_all")]).to_pylist()
        counts = {str(e["reason"]): e["count_all"] for e in reasons}
        if duplicates.num_rows >= sum(e["count_all"] for e in splits if e["split"] == "train"):
            raise UsageError(f"no training row is left: split 'train' lost all its rows as {counts or 'it has none'}; "
                             "give training rows, or set dedup.hold_out_groups=false where held-out pictures show "
                             "products that are trained on")  # fmt: skip
        return {"rows": {e["split"]: e["count_all"] for e in splits}, "dropped": duplicates.num_rows,
                "reasons": dict(sorted(counts.items()))}

    def vocabulary(self) -> dict[str, int]:
        """Term -> training images, for terms that enough images propose."""
        target = self.out.work("vocabulary.parquet")
        if not storage.exists(target):
            from ray.data.aggregate import Sum

            config = self.config.annotations
            counts = self.map(self.parts, lambda item: count_candidates(read_table(item["uri"], TEXT_COLUMNS), config))
            total = counts.groupby("term", num_partitions(self.parts)).aggregate(Sum("images", alias_name="images"))
            frequent = total.map_batches(lambda t: t.filter(pc.greater_equal(t["images"], config.min_images)),
                                         batch_format="pyarrow", batch_size=None)  # fmt: skip
            write_table(target, collect(frequent, COUNTS).sort_by("term"))
        table = read_table(target)
        return dict(zip(table["term"].to_pylist(), table["images"].to_pylist(), strict=True))

    def annotate(self, vocabulary: dict[str, int]) -> dict[str, Any]:
        """``annotations/part-*``, the borrowed annotations of dropped copies, and the sketch of the dictionary."""
        out, work, config, seed = self.out.uri, self.out.work("borrowed"), self.config, self.config.seed
        shared = broadcast((frozenset(vocabulary), read_table(self.out.path("duplicates.parquet"))))

        def task(item: Item) -> pa.Table:
            terms, duplicates = shared()
            rows = read_table(item["uri"], TEXT_COLUMNS)
            annotations = annotate(rows, terms, config.annotations)
            write_table(storage.join(out, "annotations.parquet", part_name(item["number"])), annotations)
            borrowed = borrow(annotations, duplicates)
            if borrowed.num_rows:
                write_table(storage.join(work, part_name(item["number"])), borrowed)
            kept = keep_training(rows, duplicates)
            return sketch_part(annotations, kept, config.dictionary, config.annotations.high_confidence, seed)

        blocks = blocks_of(self.map(self.parts, task))
        sketch = reduce(lambda a, b: merge_sketches(a, b, config.dictionary), blocks, SKETCH.empty_table())
        write_table(self.out.work("sketch.parquet"), sketch.sort_by([("key", "ascending"), ("unit_hash", "ascending")]))
        return {"terms": len(vocabulary), "sketch_rows": sketch.num_rows}

    def dictionary(self, vocabulary: dict[str, int]) -> dict[str, Any]:
        """``dictionary.parquet``: concreteness of every term."""
        config, seed = self.config.dictionary, self.config.seed
        samples = Samples(read_table(self.out.work("sketch.parquet")), sorted(vocabulary), config, seed)
        shared = broadcast((self._standard_features(samples.image_ids), samples))

        def task(item: Item) -> pa.Table:
            from lookalike.data.concreteness import train_probes  # torch is slow to import: only here

            features, chosen = shared()
            hits = train_probes(features, chosen.questions(item["terms"]), config.probe, seed)
            return pa.table({"term": pa.array(item["terms"], pa.string()), "hits": pa.array(hits, pa.int64())})

        chunks = [{"number": number, "terms": terms} for number, terms in enumerate(samples.chunks())]
        hits: dict[str, int] = {}
        for block in blocks_of(self.map(chunks, task)) if chunks else ():
            hits.update(zip(block["term"].to_pylist(), block["hits"].to_pylist(), strict=True))
        table = decide(vocabulary, samples, hits)
        write_table(self.out.path("dictionary.parquet"), table)
        counts = table.group_by("status").aggregate([([], "count_all")]).to_pylist()
        return {"terms": table.num_rows, **{entry["status"]: entry["count_all"] for entry in counts}}

    def _standard_features(self, image_ids: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        items = part_items(self.work_parts("features"))
        wanted = broadcast(pa.array(image_ids, pa.string()))

        def task(item: Item) -> pa.Table:
            table = read_table(item["uri"])
            return table.filter(pc.is_in(table["image_id"], value_set=wanted()))

        schema = feature_schema(read_table(items[0]["uri"], ["vector"]).schema.field("vector").type.list_size)
        found = align(collect(self.map(items, task), schema), image_ids)
        scale = np.maximum(found.std(axis=0), 1e-6)
        return np.asarray((found - found.mean(axis=0)) / scale, dtype=np.float32)

    def cluster(self, vocabulary: dict[str, int]) -> dict[str, Any]:
        """``clusters.parquet`` of the dictionary's terms; the work folder gets the clusters of all terms."""
        config, seed = self.config.clusters, self.config.seed
        classifier = InterestClassifier(read_taxonomy(config.taxonomy), config.embedder)
        dictionary = read_table(self.out.path("dictionary.parquet"))
        kept = dictionary.filter(pc.equal(dictionary["status"], "kept"))["term"].to_pylist()
        if not kept:
            raise UsageError(f"no term of {dictionary.num_rows} is concrete at dictionary.boundary="
                             f"{self.config.dictionary.boundary}; lower it, or give more images or better embeddings")
        clusters = cluster_terms(kept, classifier, config, seed)
        write_table(self.out.path("clusters.parquet"), clusters)
        write_table(self.out.work("all_clusters.parquet"), cluster_terms(sorted(vocabulary), classifier, config, seed))
        terms = sorted(vocabulary)
        flat = pa.array(classifier.probabilities(terms).reshape(-1), pa.float32())
        table = pa.table({"term": terms, "p": pa.FixedSizeListArray.from_arrays(flat, len(classifier.interests))})
        write_table(self.out.work("interests.parquet"), table)
        return {"terms": len(kept), "clusters": max(clusters["cluster"].to_pylist()) + 1,
                "interests": classifier.interests}  # fmt: skip

    def assign(self, interests: list[str]) -> dict[str, Any]:
        """``image_labels.parquet/part-*`` and ``classes.json``; counts for the ablation."""
        out, minimum = self.out, self.config.min_images_per_label
        shared = broadcast((self._tables(interests), read_table(out.path("duplicates.parquet")), self._borrowed()))
        text = out.path("annotations.parquet")

        def assign(item: Item) -> pa.Table:
            tables, duplicates, borrowed = shared()
            rows = keep_training(read_table(item["uri"], ["image_id", "group", "dataset", "split"]), duplicates)
            annotations = read_table(storage.join(text, part_name(item["number"])))
            both = pa.concat_tables([annotations, borrowed])
            assigned, counts = assignment.assign_part(both, rows["image_id"].to_pylist(), tables)
            write_table(storage.join(work, part_name(item["number"])), assigned)
            return counts

        work = out.work("assigned")
        blocks = [assignment.LABEL_COUNTS.empty_table(), *blocks_of(self.map(self.parts, assign))]
        merged = pa.concat_tables(blocks).group_by(["variant", "cluster"]).aggregate([("images", "sum")])
        counts = merged.rename_columns(assignment.LABEL_COUNTS.names).cast(assignment.LABEL_COUNTS)
        columns = assignment.choose_classes(counts, minimum)

        def number(item: Item) -> pa.Table:
            assigned = read_table(storage.join(work, part_name(item["number"])))
            numbered = assignment.number_part(assigned, columns)
            write_table(storage.join(out.uri, "image_labels.parquet", part_name(item["number"])), numbered)
            return pa.table({"counts": [assignment.count_labels(numbered, len(columns)).tolist()]})

        totals = np.sum([b["counts"][0].as_py() for b in blocks_of(self.map(self.parts, number))], axis=0)
        images, labelled, labels = (int(value) for value in totals[len(columns) :])
        clusters, everything = self._clusters()
        out.write_json("classes.json", assignment.describe_classes(clusters, columns, totals[: len(columns)].tolist()))
        kept = len(clusters["term"].unique())
        terms = dict(zip(assignment.VARIANTS, (len(everything["term"].unique()), kept, kept), strict=True))
        return {"images": images, "labelled_images": labelled, "labels": len(columns), "label_count": labels,
                "labels_per_image": round(labels / max(labelled, 1), 3),
                "ablation": assignment.ablation_rows(counts, images, minimum, terms)}  # fmt: skip

    def _tables(self, interests: list[str]) -> assignment.Tables:
        table = read_table(self.out.work("interests.parquet"))
        values = np.stack(table["p"].to_numpy(zero_copy_only=False)).astype(np.float32)
        probabilities = dict(zip(table["term"].to_pylist(), values, strict=True))
        clusters, everything = self._clusters()
        return assignment.make_tables(probabilities, clusters, everything, interests, self.config.restriction.share)

    def _clusters(self) -> tuple[pa.Table, pa.Table]:
        return read_table(self.out.path("clusters.parquet")), read_table(self.out.work("all_clusters.parquet"))

    def _borrowed(self) -> pa.Table:
        return pa.concat_tables([ANNOTATIONS.empty_table(), *map(read_table, self.work_parts("borrowed"))])


def run(run: StageRun[LabelsConfig]) -> None:
    """All steps, in order; see the module's text."""
    ensure_ray()
    job = LabelJob(run)
    job.once("prepare", job.prepare)
    dedup = job.once("dedup", job.dedup)
    with timed(log, "step", name="vocabulary"):
        vocabulary = job.vocabulary()
    if not vocabulary:
        raise UsageError(f"no term is named by {run.config.annotations.min_images} training images; lower "
                         "annotations.min_images or check the text columns")  # fmt: skip
    annotated = job.once("annotate", lambda: job.annotate(vocabulary))
    dictionary = job.once("dictionary", lambda: job.dictionary(vocabulary))
    clusters = job.once("cluster", lambda: job.cluster(vocabulary))
    assigned = job.once("assign", lambda: job.assign(clusters["interests"]))
    stats = {**assigned, "duplicates": dedup, "terms": annotated["terms"], "dictionary": dictionary,
             "clusters": clusters["clusters"]}  # fmt: skip
    boundary = run.config.dictionary.boundary
    job.once("report", lambda: write_report(run.out, job.corpus, stats, run.config.report, boundary))
    run.out.stats = stats


STAGE: Stage[LabelsConfig] = Stage(
    "labels", "labels", LabelsConfig, run, inputs={"corpus": Input("corpus"), "embeddings": Input("embeddings")},
    resumable=True,
)  # fmt: skip
