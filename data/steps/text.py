"""Annotations: the vocabulary, the terms of every image, and what dropped copies lend to the rows that stay."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.data.annotations import (
    ANNOTATIONS,
    BATCH_ROWS,
    COUNTS,
    TEXT_COLUMNS,
    annotate,
    count_candidates,
    frequent_terms,
    make_annotator,
    most_frequent,
    sum_counts,
)
from lookalike.data.dedup import borrow
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
from lookalike.data.steps.job import LabelJob
from lookalike.data.vocabulary import Vocabulary
from lookalike.errors import UsageError

PARTS_PER_TASK = 16  # counted together before they are shuffled
_DONE = pa.schema([("annotations", pa.int64())])


def mine(job: LabelJob) -> dict[str, Any]:
    """``vocabulary.parquet`` in the work folder: terms that enough training images propose."""
    from ray.data.aggregate import Sum

    config = job.config.annotations
    lists = config.lists()
    shared = broadcast(lists)

    def task(item: Item) -> pa.Table:
        annotator, terms = make_annotator(config), shared()
        records = chain.from_iterable(read_text(uri) for uri in item["uris"])
        return sum_counts(count_candidates(batch, annotator, terms) for batch in records)

    uris = [item["uri"] for item in job.parts]
    size = max(1, min(PARTS_PER_TASK, len(uris) // num_partitions(job.parts)))
    groups = [{"uris": uris[start : start + size]} for start in range(0, len(uris), size)]
    total = job.map(groups, task).groupby("term", num_partitions(groups)).aggregate(Sum("images", alias_name="images"))
    frequent = total.map_batches(lambda counts: frequent_terms(counts, config, shared()), batch_format="pyarrow",
                                 batch_size=None)  # fmt: skip
    vocabulary = most_frequent(collect(frequent, COUNTS), config.max_terms)
    if not vocabulary.num_rows:
        raise UsageError(_no_terms(job))
    write_table(job.out.work("vocabulary.parquet"), vocabulary)
    return {"terms": vocabulary.num_rows}


def _no_terms(job: LabelJob) -> str:
    config = job.config.annotations
    told = f"no term is named by {config.min_images} training images; lower annotations.min_images or "
    if config.annotator == "precomputed":
        if config.scores_from == "annotations":
            return told + ("map the column of your keyword model to the corpus field 'annotations', or set "
                           "annotations.scores_from=keywords")  # fmt: skip
        return told + "write keywords as term:score"
    return told + "check the text columns" + (" and annotations.vocabulary" if config.vocabulary else "")


def read_text(uri: str) -> Iterator[pa.Table]:
    """The text columns of a corpus part, a bounded number of rows at a time."""
    filesystem, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        present = [name for name in TEXT_COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(BATCH_ROWS, columns=present):
            yield pa.Table.from_batches([batch])


def annotate_all(job: LabelJob) -> dict[str, Any]:
    """``annotations/part-*`` and, in the work folder, the borrowed annotations of dropped copies."""
    out, work, config = job.out.uri, job.out.work("borrowed"), job.config.annotations
    vocabulary = Vocabulary(job.vocabulary(), config.lists().aliases)
    shared = broadcast((vocabulary, read_table(job.out.path("duplicates.parquet"))))

    def task(item: Item) -> pa.Table:
        terms, duplicates = shared()
        annotator = make_annotator(config)
        batches = [annotate(records, annotator, terms) for records in read_text(item["uri"])]
        found = pa.concat_tables([ANNOTATIONS.empty_table(), *batches])
        write_table(storage.join(out, "annotations.parquet", part_name(item["number"])), found)
        borrowed = borrow(found, duplicates)
        if borrowed.num_rows:
            write_table(storage.join(work, part_name(item["number"])), borrowed)
        return pa.table([[found.num_rows]], schema=_DONE)

    rows = sum(sum(block["annotations"].to_pylist()) for block in blocks_of(job.map(job.parts, task)))
    return {"annotations": rows}
