"""Annotations: the vocabulary, and the terms of every image."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.data.parts import (
    Item,
    add_up,
    blocks_of,
    broadcast,
    num_partitions,
    part_name,
    read_table,
    sum_images,
    write_table,
)
from lookalike.data.steps.job import LabelJob
from lookalike.data.text.annotations import (
    ANNOTATIONS,
    BATCH_ROWS,
    COUNTS,
    TEXT_COLUMNS,
    annotate,
    count_candidates,
    frequent_terms,
    make_annotator,
    most_frequent,
)
from lookalike.data.text.annotators import Annotator
from lookalike.data.text.spellings import SPELLINGS, common_spellings, count_spellings
from lookalike.data.text.vocabulary import Vocabulary
from lookalike.errors import UsageError

PARTS_PER_TASK = 16  # counted together before they are shuffled
_DONE = pa.schema([("annotations", pa.int64())])


def mine(job: LabelJob) -> dict[str, Any]:
    """Write ``vocabulary.parquet``, the terms that enough training images propose; return their number."""
    config = job.config.annotations
    shared = broadcast(config.lists())

    def task(item: Item) -> pa.Table:
        annotator, terms = make_annotator(config), shared()
        records = chain.from_iterable(read_text(part["uri"]) for part in item["parts"])
        counts = chain.from_iterable(count_candidates(batch, annotator, terms) for batch in records)
        return add_up(counts, ["term"], COUNTS)

    groups = _groups(job.parts)

    def keep(counts: pa.Table) -> pa.Table:
        return frequent_terms(counts, config, shared())

    frequent = sum_images(job.map(groups, task), ["term"], num_partitions(groups), keep, COUNTS)
    vocabulary = most_frequent(frequent, config.max_terms)
    if not vocabulary.num_rows:
        raise UsageError(_no_terms(job))
    write_table(job.out.work("vocabulary.parquet"), vocabulary)
    return {"terms": vocabulary.num_rows}


def _groups(parts: list[Item]) -> list[Item]:
    """Groups of parts, one per task: few enough parts each that every CPU has work."""
    size = max(1, min(PARTS_PER_TASK, len(parts) // num_partitions(parts)))
    return [{"parts": parts[start : start + size]} for start in range(0, len(parts), size)]


def _no_terms(job: LabelJob) -> str:
    config = job.config.annotations
    problem = f"no term is named by {config.min_images} training images; lower annotations.min_images or "
    if config.annotator != "precomputed":
        where = "check the text columns" + (" and annotations.vocabulary" if config.vocabulary else "")
        return f"{problem}{where}; pictures without words take words: false"
    if config.scores_from == "keywords":
        return problem + "write keywords as term:score"
    column = "map the column of your keyword model to the corpus field 'annotations'"
    return f"{problem}{column}, or set annotations.scores_from=keywords"


def read_text(uri: str) -> Iterator[pa.Table]:
    """Tables with the text columns of a corpus part, of a bounded number of rows."""
    filesystem, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        present = [name for name in TEXT_COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(BATCH_ROWS, columns=present):
            yield pa.Table.from_batches([batch])


def annotate_all(job: LabelJob) -> dict[str, Any]:
    """Write ``annotations.parquet/part-*``; return the number of annotations."""
    folder, config = storage.join(job.out.uri, "annotations.parquet"), job.config.annotations
    spellings = job.out.work("spellings")
    shared = broadcast(Vocabulary(list(job.vocabulary()), config.lists().aliases))

    def task(item: Item) -> pa.Table:
        annotator, vocabulary = make_annotator(config), shared()
        rows = [_annotate_part(part, (folder, spellings), annotator, vocabulary) for part in item["parts"]]
        return pa.table([rows], schema=_DONE)

    rows = sum(sum(block["annotations"].to_pylist()) for block in blocks_of(job.map(_groups(job.parts), task)))
    counted = add_up((read_table(part["uri"]) for part in job.work_items("spellings")), ["term", "spelling"], SPELLINGS)
    return {"annotations": rows, "spellings": common_spellings(counted.to_pylist(), job.vocabulary())}


def _annotate_part(part: Item, folders: tuple[str, str], annotator: Annotator, vocabulary: Vocabulary) -> int:
    """Write the spellings and the annotations of a part unless an earlier attempt did; return their number."""
    uri, spellings = (storage.join(folder, part_name(part["number"])) for folder in folders)
    if storage.exists(uri):
        return int(read_table(uri, ["score"]).num_rows)
    counted = [count_spellings(records, vocabulary, annotator.config) for records in read_text(part["uri"])]
    write_table(spellings, add_up(counted, ["term", "spelling"], SPELLINGS))
    tables = [annotate(records, annotator, vocabulary) for records in read_text(part["uri"])]
    table = pa.concat_tables([ANNOTATIONS.empty_table(), *tables])
    write_table(uri, table)
    return int(table.num_rows)
