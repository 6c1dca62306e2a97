"""The visual dictionary: one pass of sketches, then batches of probes: ``dictionary.parquet``."""

from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.dedup import keep_training
from lookalike.data.dictionary import SKETCH, Samples, decide, merge_sketches, sketch_part
from lookalike.data.features import align, feature_schema
from lookalike.data.parts import Item, blocks_of, broadcast, collect, part_items, part_name, read_table, write_table
from lookalike.data.steps.job import LabelJob


def score(job: LabelJob) -> dict[str, Any]:
    """``dictionary.parquet``: concreteness of every term."""
    config, seed = job.config.dictionary, job.config.seed
    vocabulary = job.vocabulary()
    samples = Samples(_sketch(job), sorted(vocabulary), config, seed)
    shared = broadcast((_standard_features(job, samples.image_ids), samples))

    def task(item: Item) -> pa.Table:
        from lookalike.data.concreteness import train_probes  # torch is slow to import: only here

        features, chosen = shared()
        hits = train_probes(features, chosen.questions(item["terms"]), config.probe, seed)
        return pa.table({"term": pa.array(item["terms"], pa.string()), "hits": pa.array(hits, pa.int64())})

    chunks = [{"number": number, "terms": terms} for number, terms in enumerate(samples.chunks())]
    hits: dict[str, int] = {}
    for block in blocks_of(job.map(chunks, task)) if chunks else ():
        hits.update(zip(block["term"].to_pylist(), block["hits"].to_pylist(), strict=True))
    table = decide(vocabulary, samples, hits)
    write_table(job.out.path("dictionary.parquet"), table)
    counts = table.group_by("status").aggregate([([], "count_all")]).to_pylist()
    return {"terms": table.num_rows, "boundary": config.boundary,
            **{entry["status"]: entry["count_all"] for entry in counts}}  # fmt: skip


def _sketch(job: LabelJob) -> pa.Table:
    config, high, seed = job.config.dictionary, job.config.annotations.high_confidence, job.config.seed
    text, dropped = job.out.path("annotations.parquet"), job.out.path("duplicates.parquet")

    def task(item: Item) -> pa.Table:
        name = part_name(item["number"])
        duplicates = read_table(storage.join(dropped, name))
        rows = keep_training(read_table(item["uri"], ["image_id", "group", "dataset", "split"]), duplicates)
        annotations = read_table(storage.join(text, name))
        return sketch_part(annotations, rows, config, high, seed)

    blocks = blocks_of(job.map(job.parts, task))
    sketch = reduce(lambda a, b: merge_sketches(a, b, config), blocks, SKETCH.empty_table())
    return sketch.sort_by([("key", "ascending"), ("unit_hash", "ascending")])


def _standard_features(job: LabelJob, image_ids: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    items = part_items(job.work_parts("signatures"))
    wanted = broadcast(pa.array(image_ids, pa.string()))

    def task(item: Item) -> pa.Table:
        table = read_table(item["uri"], ["image_id", "vector"])
        return table.filter(pc.is_in(table["image_id"], value_set=wanted()))

    schema = feature_schema(read_table(items[0]["uri"], ["vector"]).schema.field("vector").type.list_size)
    found = align(collect(job.map(items, task), schema), image_ids)
    scale = np.maximum(found.std(axis=0), 1e-6)
    return np.asarray((found - found.mean(axis=0)) / scale, dtype=np.float32)
