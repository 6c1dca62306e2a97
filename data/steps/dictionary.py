"""The visual dictionary, ``dictionary.parquet``: sketches, one shuffle by term, then batches of classifiers.

Terms are spread over B buckets by their hash. In the work folder, ``sketch-B/part-N`` holds the samples of bucket N
with their vectors, part B the random images of all data sets; ``scores-B/part-N`` holds the scores of the terms of
bucket N. A later attempt skips the buckets that are already there.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.dictionary.boundary import (
    BoundaryChoice,
    BoundaryConfig,
    choose_by_retrieval,
    choose_by_words,
    read_words,
)
from lookalike.data.dictionary.scores import SCORES, decide, merge_scores
from lookalike.data.dictionary.sketch import (
    LIMITS,
    Pools,
    buckets_of,
    find_limits,
    first_by_hash,
    merge_all,
    merge_sketches,
    sketch_part,
)
from lookalike.data.duplicates.dedup import keep_training
from lookalike.data.features import vectors_of
from lookalike.data.parts import (
    Item,
    blocks_of,
    broadcast,
    map_parts,
    num_partitions,
    part_name,
    read_table,
    write_table,
)
from lookalike.data.steps.exchange import exchange, with_key
from lookalike.data.steps.job import LabelJob
from lookalike.progress import track

FEW_SPANS = 16  # with more spans, limits are found before sketches are shuffled
ROW_BYTES = 400  # what `exchange` expects of a row
_VALID = pa.schema([("image_id", pa.string()), ("label", pa.string())])


def score(job: LabelJob, splits: dict[str, int], spellings: dict[str, str]) -> dict[str, Any]:
    """Write ``dictionary.parquet``, the concreteness of every term; return counts by status and the boundary.

    ``splits``: rows of each split; ``spellings``: term -> how it is written with accents. The driver holds the
    dictionary, about 150 bytes a term.
    """
    vocabulary = job.vocabulary()
    buckets = job.once("sketch", _sketch, vocabulary, sum(splits.values()))["buckets"]
    scores = _score_buckets(job, buckets)
    scored = merge_scores(vocabulary, scores)
    config = job.config.dictionary
    choice = None if config.boundary_from is None else _choose_boundary(job, scored, config.boundary_from, buckets)
    boundary = config.boundary if choice is None else choice.boundary
    table = decide(scored, boundary)
    shown = pa.array([spellings.get(term, term) for term in table["term"].to_pylist()], pa.string())
    write_table(job.out.path("dictionary.parquet"), table.append_column("spelling", shown))
    counts = table.group_by("status").aggregate([([], "count_all")]).to_pylist()
    reused = int(pc.sum(scores["reused"]).as_py() or 0)
    stats = {
        "terms": table.num_rows,
        "boundary": boundary,
        "reused": reused,
        "trained": int(pc.count(scores["digest"]).as_py()) - reused,
        **{entry["status"]: entry["count_all"] for entry in counts},
    }
    if choice is not None:
        stats |= {"criterion": choice.criterion, "curve": choice.curve, **choice.facts}
    return stats


def load_part(job: LabelJob, item: Item, columns: list[str]) -> tuple[pa.Table, pa.Table]:
    """The kept training rows of a corpus part (``columns`` of its signatures, and ``creator``), and its annotations."""
    name = part_name(item["number"])
    rows = read_table(job.out.work("signatures", name), [*columns, "split"])
    rows = rows.append_column("creator", read_table(item["uri"], ["creator"])["creator"])
    training = keep_training(rows, read_table(job.out.path("duplicates.parquet", name)))
    return training, read_table(job.out.path("annotations.parquet", name))


def _spans(job: LabelJob) -> list[Item]:
    """Runs of neighbouring parts, four per CPU: their sketches are merged before the shuffle."""
    size = -(-len(job.parts) // (2 * num_partitions(job.parts)))
    starts = range(0, len(job.parts), size)
    return [{"number": n, "parts": job.parts[start : start + size]} for n, start in enumerate(starts)]


def _sketch(job: LabelJob, vocabulary: dict[str, int], images: int) -> dict[str, Any]:
    """Write ``sketch-B/part-N``, the samples of every bucket's terms, and the pools; return B."""
    config, spans = job.config.dictionary, _spans(job)
    buckets = max(1, -(-len(vocabulary) // config.terms_per_task))
    rows = sum(min(count, config.positives) for count in vocabulary.values()) + min(images, config.pool_total)
    limits = None
    if len(spans) > FEW_SPANS:
        _exchange_sketches(job, spans, buckets, rows=max(rows * len(spans), images), limits=None, light=True)
        uris = [item["uri"] for item in job.work_items(f"limits-{buckets}")]
        limits = pa.concat_tables([LIMITS.empty_table(), *map(read_table, uris)])
    rows *= (1 if limits is not None else len(spans)) * -(-(2 * job.config.feature_dim + 100) // ROW_BYTES)
    _exchange_sketches(job, spans, buckets, rows=max(rows, images), limits=limits, light=False)
    return {"buckets": buckets}


def _exchange_sketches(
    job: LabelJob, spans: list[Item], buckets: int, *, rows: int, limits: pa.Table | None, light: bool
) -> None:
    """Write the sketches of the buckets; if ``light``, only their ``LIMITS`` (30 bytes a term, for the driver)."""
    config, seed, high = job.config.dictionary, job.config.seed, job.config.annotations.high_confidence
    columns = ["image_id", "group", "dataset", *([] if light else ["vector"])]
    shared = broadcast(limits)

    def sketch(item: Item) -> pa.Table:
        rows, annotations = load_part(job, item, columns)
        return sketch_part(annotations, rows, config, high=high, seed=seed, limits=shared())

    def spread(span: Item) -> pa.Table:
        merged = merge_all((sketch(item) for item in span["parts"]), config)
        merged = merged.select(["key", "unit_hash"]) if light else merged
        return with_key(merged.rename_columns({"key": "name"}), buckets_of(merged["key"], buckets))

    def gather(rows: pa.Table) -> pa.Table:
        rows = rows.rename_columns({"name": "key"})
        return find_limits(rows, config) if light else merge_sketches([rows], config)

    exchange(job, spans, spread, gather, kind=f"{'limits' if light else 'sketch'}-{buckets}", rows=rows)


def _score_buckets(job: LabelJob, buckets: int) -> pa.Table:
    """Write and return ``SCORES`` of all sampled terms."""
    config, seed, folder = job.config.dictionary, job.config.seed, job.out.work(f"scores-{buckets}")
    sketches = job.out.work(f"sketch-{buckets}")
    shared = broadcast((Pools(read_table(storage.join(sketches, part_name(buckets)))), _previous(job)))
    device = "cuda" if config.num_gpus else "cpu"

    def task(item: Item) -> pa.Table:
        from lookalike.data.dictionary.concreteness import score_bucket  # imports torch, which is slow

        target = storage.join(folder, part_name(item["number"]))
        if not storage.exists(target):
            pools, previous = shared()
            scores = score_bucket(read_table(item["uri"]), pools, previous, config, seed=seed, device=device)
            write_table(target, scores)
        return read_table(target)

    items = [item for item in job.work_items(f"sketch-{buckets}") if item["number"] < buckets]
    if not items:
        return SCORES.empty_table()
    scored = map_parts(items, task, concurrency=job.config.concurrency, num_gpus=config.num_gpus)
    tables = [block.cast(SCORES) for block in track(blocks_of(scored), "labels concreteness", unit="block")]
    return pa.concat_tables(tables)


def _previous(job: LabelJob) -> pa.Table:
    """Term, digest and hits of the previous run's dictionary; 60 bytes a term."""
    empty = pa.schema([SCORES.field(name) for name in ("term", "digest", "hits")]).empty_table()
    if job.previous is None:
        return empty
    table = read_table(job.previous.path("dictionary.parquet"))
    if "digest" not in table.column_names:  # of a version that stored no digests
        return empty
    return table.select(empty.column_names).filter(pc.is_valid(table["digest"]))


def _choose_boundary(job: LabelJob, scored: pa.Table, config: BoundaryConfig, buckets: int) -> BoundaryChoice:
    if config.criterion == "words":
        assert config.words is not None
        return choose_by_words(scored, read_words(config.words))
    pools = Pools(read_table(storage.join(job.out.work(f"sketch-{buckets}"), part_name(buckets))))
    images = _validation_images(job, config)
    vectors = vectors_of(images) if images.num_rows else pools.vectors[:0]
    return choose_by_retrieval(scored, pools, vectors, images["label"].to_pylist(), config.ridge)


def _validation_images(job: LabelJob, config: BoundaryConfig) -> pa.Table:
    """Image id, label and vector of up to ``config.images`` images of the validation split, chosen by hash."""
    signatures, seed = job.out.work("signatures"), job.config.seed

    def task(item: Item) -> pa.Table:
        columns = ["image_id", "group", "split", "vector"]
        signed = read_table(storage.join(signatures, part_name(item["number"])), columns)
        label = pc.coalesce(signed["group"], read_table(item["uri"], ["category"])["category"])
        rows = signed.select(["image_id", "vector"]).append_column("label", label)
        usable = rows.filter(pc.and_(pc.equal(signed["split"], config.split), pc.is_valid(label)))
        return first_by_hash(usable, config.images, seed)

    blocks = list(blocks_of(job.map(job.parts, task)))
    return first_by_hash(pa.concat_tables(blocks), config.images, seed) if blocks else _VALID.empty_table()
