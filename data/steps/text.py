"""Annotations: the vocabulary, the terms of every image, and what dropped copies lend to the rows that stay."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.annotations import COUNTS, TEXT_COLUMNS, annotate, count_candidates
from lookalike.data.parts import (
    Item,
    blocks_of,
    broadcast,
    collect,
    num_partitions,
    part_name,
    read_table,
    write_table,
)
from lookalike.data.steps import duplicates
from lookalike.data.steps.job import LabelJob
from lookalike.errors import UsageError

_DONE = pa.schema([("annotations", pa.int64())])


def mine(job: LabelJob) -> dict[str, Any]:
    """``vocabulary.parquet`` in the work folder: terms that enough training images propose."""
    from ray.data.aggregate import Sum

    config = job.config.annotations
    counts = job.map(job.parts, lambda item: count_candidates(read_table(item["uri"], TEXT_COLUMNS), config))
    total = counts.groupby("term", num_partitions(job.parts)).aggregate(Sum("images", alias_name="images"))
    frequent = total.map_batches(lambda t: t.filter(pc.greater_equal(t["images"], config.min_images)),
                                 batch_format="pyarrow", batch_size=None)  # fmt: skip
    vocabulary = collect(frequent, COUNTS).sort_by("term")
    if not vocabulary.num_rows:
        raise UsageError(f"no term is named by {config.min_images} training images; lower annotations.min_images or "
                         "check the text columns")  # fmt: skip
    write_table(job.out.work("vocabulary.parquet"), vocabulary)
    return {"terms": vocabulary.num_rows}


def annotate_all(job: LabelJob) -> dict[str, Any]:
    """``annotations/part-*`` and, in the work folder, the borrowed annotations of dropped copies."""
    out, config = job.out.uri, job.config.annotations
    shared = broadcast(frozenset(job.vocabulary()))

    def task(item: Item) -> pa.Table:
        annotations = annotate(read_table(item["uri"], TEXT_COLUMNS), shared(), config)
        write_table(storage.join(out, "annotations.parquet", part_name(item["number"])), annotations)
        return pa.table([[annotations.num_rows]], schema=_DONE)

    rows = sum(sum(block["annotations"].to_pylist()) for block in blocks_of(job.map(job.parts, task)))
    duplicates.lend(job)
    return {"annotations": rows}
