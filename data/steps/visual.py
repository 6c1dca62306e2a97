"""The visual dictionary: sketches, one shuffle by term, then batches of classifiers: ``dictionary.parquet``.

Terms are spread over buckets by their hash. ``sketch-B/part-N`` of the work folder holds the samples of bucket N of B
with their vectors, part B the random images of all data sets; ``scores-B/part-N`` its terms' scores. A bucket that is
scored is not scored again by an attempt that continues; the sketches, which meet in a shuffle, are made in one go.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.boundary import BoundaryConfig, Choice, choose_by_retrieval, choose_by_words, read_words
from lookalike.data.dedup import keep_training
from lookalike.data.dictionary import SCORES, decide, merge_scores
from lookalike.data.parts import (
    Item,
    blocks_of,
    broadcast,
    collect,
    map_parts,
    num_partitions,
    part_name,
    read_table,
    write_table,
)
from lookalike.data.sketch import (
    LIMITS,
    Pools,
    buckets_of,
    find_limits,
    first_by_hash,
    merge_all,
    merge_sketches,
    sketch_part,
    vectors_of,
)
from lookalike.data.steps.job import LabelJob
from lookalike.progress import track

FEW_SPANS = 16  # up to here sketches are shuffled as they are; above, limits are found first
LOCAL_ROWS = 100_000  # up to here one task merges all buckets: a shuffle's start costs more than the work
ROWS_PER_PARTITION = 100_000  # of a shuffle, with their vectors
_ROWS = ["image_id", "group", "dataset", "creator", "split"]
_WRITTEN = pa.schema([("bucket", pa.int64()), ("rows", pa.int64())])
_VALID = pa.schema([("image_id", pa.string()), ("label", pa.string())])
Merge = Callable[[pa.Table], pa.Table]


def score(job: LabelJob) -> dict[str, Any]:
    """``dictionary.parquet``: concreteness of every term. The driver holds this table, about 150 bytes a term."""
    vocabulary = job.vocabulary()
    buckets = job.once("sketch", lambda job: _sketch(job, vocabulary))["buckets"]
    scores = _score_buckets(job, buckets)
    scored = merge_scores(vocabulary, scores)
    config = job.config.dictionary
    choice = None if config.boundary_from is None else _choose(job, scored, config.boundary_from, buckets)
    boundary = config.boundary if choice is None else choice.boundary
    table = decide(scored, boundary)
    write_table(job.out.path("dictionary.parquet"), table)
    counts = table.group_by("status").aggregate([([], "count_all")]).to_pylist()
    reused = int(pc.sum(scores["reused"]).as_py() or 0)
    stats = {"terms": table.num_rows, "boundary": boundary, "reused": reused,
             "trained": int(pc.count(scores["digest"]).as_py()) - reused,
             **{entry["status"]: entry["count_all"] for entry in counts}}  # fmt: skip
    if choice is not None:
        stats |= {"criterion": choice.criterion, "curve": choice.curve, **choice.facts}
    return stats


def load_part(job: LabelJob) -> Callable[[Item, bool], tuple[pa.Table, pa.Table]]:
    """A function of a corpus part that gives its kept training rows (``_ROWS``, vector if asked for) and its words."""
    text, duplicates = job.out.path("annotations.parquet"), broadcast(read_table(job.out.path("duplicates.parquet")))
    vectors = _load_vectors(job)

    def load(item: Item, with_vectors: bool) -> tuple[pa.Table, pa.Table]:
        rows = keep_training(read_table(item["uri"], _ROWS), duplicates())
        if with_vectors:
            rows = rows.append_column("vector", vectors(item, rows["image_id"]))
        return rows, read_table(storage.join(text, part_name(item["number"])))

    return load


def _load_vectors(job: LabelJob) -> Callable[[Item, pa.ChunkedArray], pa.ChunkedArray]:
    """A function of a corpus part and some of its image ids that gives their projected embeddings."""
    features = job.work_parts("features")

    def load(_: Item, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        wanted = ids.combine_chunks()
        tables = (read_table(uri, ["image_id", "vector"]) for uri in features)
        found = pa.concat_tables([t.filter(pc.is_in(t["image_id"], value_set=wanted)) for t in tables])
        return found["vector"].take(pc.index_in(wanted, value_set=found["image_id"].combine_chunks()))

    return load


def _spans(job: LabelJob) -> list[Item]:
    """Runs of neighbouring parts, four a CPU: what is merged inside one is never shuffled."""
    size = -(-len(job.parts) // (2 * num_partitions(job.parts)))
    starts = range(0, len(job.parts), size)
    return [{"number": n, "parts": job.parts[start : start + size]} for n, start in enumerate(starts)]


def _sketch(job: LabelJob, vocabulary: dict[str, int]) -> dict[str, Any]:
    """``sketch-B/part-N``: the samples of every bucket's terms, and the pools."""
    config, spans = job.config.dictionary, _spans(job)
    buckets = max(1, -(-len(vocabulary) // config.terms_per_task))
    rows = sum(min(images, config.positives) for images in vocabulary.values()) + config.pool_total
    folder = job.out.work(f"sketch-{buckets}")

    def merge(group: pa.Table) -> pa.Table:
        bucket = group["bucket"][0].as_py()
        merged = merge_sketches([group.drop_columns(["bucket"])], config)
        write_table(storage.join(folder, part_name(bucket)), merged)
        return pa.table([[bucket], [merged.num_rows]], schema=_WRITTEN)

    limits = _find_limits(job, spans, buckets, rows) if len(spans) > FEW_SPANS else None
    partial = _sketch_spans(job, spans, buckets, limits)
    copies = 1 if limits is not None else len(spans)
    written = _merge_buckets(job, partial, merge, rows * copies)
    total = sum(sum(block["rows"].to_pylist()) for block in track(blocks_of(written), "labels sketch", unit="block"))
    return {"buckets": buckets, "rows": total}


def _find_limits(job: LabelJob, spans: list[Item], buckets: int, rows: int) -> pa.Table:
    """``LIMITS`` of all keys that have more units than their sketch; 30 bytes a term on the driver."""
    config = job.config.dictionary

    def merge(group: pa.Table) -> pa.Table:
        return find_limits(group, config)

    units = _sketch_spans(job, spans, buckets, None, light=True)
    return collect(_merge_buckets(job, units, merge, rows * len(spans)), LIMITS)


def _sketch_spans(
    job: LabelJob, spans: list[Item], buckets: int, limits: pa.Table | None, *, light: bool = False
) -> Any:
    """Sketches of the spans with their buckets as a lazy dataset; ``light``: keys and hashes of units alone."""
    config, seed, high = job.config.dictionary, job.config.seed, job.config.annotations.high_confidence
    load, shared = load_part(job), broadcast(limits)

    def sketch(item: Item) -> pa.Table:
        rows, annotations = load(item, not light)
        return sketch_part(annotations, rows, config, high=high, seed=seed, limits=shared())

    def task(span: Item) -> pa.Table:
        merged = merge_all((sketch(item) for item in span["parts"]), config)
        merged = merged.select(["key", "unit_hash"]) if light else merged
        return merged.append_column("bucket", pa.array(buckets_of(merged["key"], buckets)))

    return job.map(spans, task)


def _merge_buckets(job: LabelJob, dataset: Any, merge: Merge, rows: int) -> Any:
    """``merge`` of all rows of each bucket, as a lazy dataset; ``rows``: about how many there are in all."""
    if rows > LOCAL_ROWS:
        partitions = max(num_partitions(job.parts), -(-rows // ROWS_PER_PARTITION))
        grouped = dataset.groupby("bucket", num_partitions=partitions)
        return grouped.map_groups(merge, batch_format="pyarrow", concurrency=job.config.concurrency)

    def whole(table: pa.Table) -> Iterator[pa.Table]:
        for bucket in pc.unique(table["bucket"]).to_pylist():
            yield merge(table.filter(pc.equal(table["bucket"], bucket)))

    return dataset.repartition(1).map_batches(whole, batch_format="pyarrow", batch_size=None)


def _score_buckets(job: LabelJob, buckets: int) -> pa.Table:
    """``SCORES`` of all sampled terms."""
    config, seed, folder = job.config.dictionary, job.config.seed, job.out.work(f"scores-{buckets}")
    sketches = job.out.work(f"sketch-{buckets}")
    shared = broadcast((Pools(read_table(storage.join(sketches, part_name(buckets)))), _previous(job)))
    device = "cuda" if config.num_gpus else "cpu"

    def task(item: Item) -> pa.Table:
        from lookalike.data.concreteness import score_bucket  # torch is slow to import: only here

        target = storage.join(folder, part_name(item["number"]))
        if not storage.exists(target):
            pools, previous = shared()
            scores = score_bucket(read_table(item["uri"]), pools, previous, config, seed=seed, device=device)
            write_table(target, scores)
        return read_table(target)

    names = [name for name in storage.list_files(sketches) if name != part_name(buckets)]
    items = [{"number": int(name[5:-8]), "uri": storage.join(sketches, name)} for name in names]
    if not items:
        return SCORES.empty_table()
    scored = map_parts(items, task, concurrency=job.config.concurrency, num_gpus=config.num_gpus)
    tables = [block.cast(SCORES) for block in track(blocks_of(scored), "labels concreteness", unit="block")]
    return pa.concat_tables(tables)


def _previous(job: LabelJob) -> pa.Table:
    """Term, digest and hits of the earlier dictionary; 60 bytes a term."""
    empty = pa.schema([SCORES.field(name) for name in ("term", "digest", "hits")]).empty_table()
    if job.previous is None:
        return empty
    table = read_table(job.previous.path("dictionary.parquet"))
    if "digest" not in table.column_names:  # of a version that stored none
        return empty
    return table.select(empty.column_names).filter(pc.is_valid(table["digest"]))


def _choose(job: LabelJob, scored: pa.Table, config: BoundaryConfig, buckets: int) -> Choice:
    if config.criterion == "words":
        assert config.words is not None
        return choose_by_words(scored, read_words(config.words))
    pools = Pools(read_table(storage.join(job.out.work(f"sketch-{buckets}"), part_name(buckets))))
    images = _validation_images(job, config)
    vectors = vectors_of(images) if images.num_rows else pools.vectors[:0]
    return choose_by_retrieval(scored, pools, vectors, images["label"].to_pylist(), config.ridge)


def _validation_images(job: LabelJob, config: BoundaryConfig) -> pa.Table:
    """Image id, label and vector of up to ``images`` images of the validation split, chosen by hash."""
    load, seed = _load_vectors(job), job.config.seed

    def task(item: Item) -> pa.Table:
        rows = read_table(item["uri"], ["image_id", "group", "category", "split"])
        rows = rows.filter(pc.equal(rows["split"], config.split))
        table = pa.table([rows["image_id"], pc.coalesce(rows["group"], rows["category"])], schema=_VALID)
        table = first_by_hash(table.filter(pc.is_valid(table["label"])), config.images, seed)
        return table.append_column("vector", load(item, table["image_id"]))

    blocks = list(blocks_of(job.map(job.parts, task)))
    return first_by_hash(pa.concat_tables(blocks), config.images, seed) if blocks else _VALID.empty_table()
