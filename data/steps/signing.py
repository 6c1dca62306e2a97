"""Signatures of all images: ``signatures/part-N`` in the work folder, row by row as in corpus part N."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.data.duplicates.copies import held_out_groups
from lookalike.data.duplicates.signatures import (
    SIGNED_COLUMNS,
    bucket_of,
    match_vectors,
    row_numbers,
    running_spans,
    sign_images,
)
from lookalike.data.features import project_part
from lookalike.data.parts import Item, blocks_of, part_items, part_name, read_table, row_groups, write_table
from lookalike.data.steps.exchange import exchange, num_buckets, return_rows, with_key
from lookalike.data.steps.job import LabelJob
from lookalike.errors import UsageError
from lookalike.progress import track

_SIGNED = pa.schema(
    [("number", pa.int64()), ("split", pa.string()), ("rows", pa.int64()), ("groups", pa.list_(pa.string()))]
)
"""Rows of each split of a signed part, and its held-out groups; a part whose embeddings were not found in order has one
row without a split."""
HELD_OUT = "held_out_groups.parquet"


def sign(job: LabelJob) -> dict[str, Any]:
    """Write the signatures of all images and the groups of held-out rows; count the rows by split.

    Embedding parts need not be cut like the corpus. If their rows are in the order of the corpus, each task reads those
    it needs; otherwise they are matched by image id in a shuffle.
    """
    files = _sizes(job.embeddings)
    sizes = [rows for _, rows in _sizes(job.corpus)]
    alike = sum(sizes) == sum(rows for _, rows in files)
    spans = [[span._asdict() for span in own] for own in running_spans(sizes, files)] if alike else [[]] * len(sizes)
    items = [{**item, "spans": own} for item, own in zip(job.parts, spans, strict=True)]
    counted = _sign_parts(job, items)
    apart = {entry["number"] for entry in counted if entry["split"] is None}
    if apart:
        _match(job, [item for item in job.parts if item["number"] in apart], sum(sizes))
        counted = _sign_parts(job, items)
    splits = Counter[str]()
    for entry in counted:
        splits[entry["split"]] += entry["rows"]
    groups = sorted({group for entry in counted for group in entry["groups"]})
    write_table(job.out.work(HELD_OUT), pa.table({"group": pa.array(groups, pa.string())}))
    return {"splits": dict(sorted(splits.items()))}


def _sizes(artifact: Artifact) -> list[tuple[str, int]]:
    entries = [e for e in artifact.manifest.files if e.path.startswith("part-") and e.path.endswith(".parquet")]
    return [(artifact.path(entry.path), entry.rows or 0) for entry in entries]


def _sign_parts(job: LabelJob, items: list[Item]) -> list[dict[str, Any]]:
    folder, matched = job.out.work("signatures"), job.out.work("vectors")
    dim, seed, mirrored = job.config.feature_dim, job.config.seed, job.config.dedup.mirrored

    def task(item: Item) -> pa.Table:
        number, target = item["number"], storage.join(folder, part_name(item["number"]))
        if storage.exists(target):
            return _count(number, read_table(target, ["group", "split"]))
        table = read_table(item["uri"], SIGNED_COLUMNS)
        vectors = _running_vectors(item["spans"], table["image_id"], dim, seed)
        apart = storage.join(matched, part_name(number))
        if vectors is None and storage.exists(apart):
            raw = read_table(apart)["vector"].combine_chunks()
            values = pa.Array.from_buffers(pa.float16(), len(raw) * raw.type.byte_width // 2, [None, raw.buffers()[1]])
            vectors = pa.FixedSizeListArray.from_arrays(values, raw.type.byte_width // 2)
        if vectors is None:
            return pa.table([[number], [None], [0], [[]]], schema=_SIGNED)
        signed = sign_images(table, vectors, number, mirrored)
        write_table(target, signed)
        return _count(number, signed)

    blocks = track(blocks_of(job.map(items, task)), "labels signatures", unit="part")
    return [entry for block in blocks for entry in block.to_pylist()]


def _count(number: int, signatures: pa.Table) -> pa.Table:
    counts = signatures.group_by("split").aggregate([([], "count_all")]).to_pylist()
    groups = sorted(held_out_groups(signatures))
    rows = [
        {"number": number, "split": entry["split"], "rows": entry["count_all"], "groups": groups if index == 0 else []}
        for index, entry in enumerate(counts)
    ]
    return pa.Table.from_pylist(rows, schema=_SIGNED)


def _running_vectors(spans: list[Item], ids: pa.ChunkedArray, dim: int, seed: int) -> pa.Array | None:
    """The projected vectors of ``ids`` if the spans hold exactly these ids, else None."""
    if not spans:
        return None
    table = pa.concat_tables([_read_rows(**span) for span in spans])
    if not table["image_id"].combine_chunks().equals(ids.combine_chunks()):
        return None
    return project_part(table, dim, seed)["vector"].combine_chunks()


def _read_rows(uri: str, start: int, stop: int) -> pa.Table:
    """Rows ``start`` to ``stop`` of an embeddings file; only the row groups that hold them are read."""
    filesystem, path = storage.arrow_filesystem(uri)
    file = pq.ParquetFile(path, filesystem=filesystem)
    groups, first = row_groups(file, start, stop)
    return file.read_row_groups(groups, columns=["image_id", "vector"]).slice(start - first, stop - start)


def _match(job: LabelJob, parts: list[Item], rows: int) -> None:
    """Write ``vectors/part-N`` of the corpus parts, matched by image id; ``UsageError`` if an image has no vector."""
    dim, seed, buckets = job.config.feature_dim, job.config.seed, num_buckets(2 * rows)
    width = 2 * min(dim, int(job.embeddings.read_json("meta.json")["dim"]))
    schema = pa.schema([("image_id", pa.string()), ("row", pa.int64()), ("vector", pa.binary(width))])

    def spread(item: Item) -> pa.Table:
        if item["kind"] == "corpus":
            ids = read_table(item["uri"], ["image_id"])["image_id"].combine_chunks()
            columns = [ids, pa.array(row_numbers(item["number"], len(ids))), pa.nulls(len(ids), pa.binary(width))]
        else:
            small = project_part(read_table(item["uri"], ["image_id", "vector"]), dim, seed)
            ids, values = small["image_id"].combine_chunks(), small["vector"].combine_chunks().flatten()
            raw = values.to_numpy(zero_copy_only=False).tobytes()
            packed = pa.Array.from_buffers(pa.binary(width), len(ids), [None, pa.py_buffer(raw)])
            columns = [ids, pa.nulls(len(ids), pa.int64()), packed]
        return with_key(pa.table(columns, schema=schema), bucket_of(ids.to_pylist(), buckets))

    items = [{**item, "kind": "corpus"} for item in parts]
    items += [{**item, "kind": "vectors"} for item in part_items([uri for uri, _ in _sizes(job.embeddings)])]
    exchange(job, items, spread, match_vectors, kind="matched", rows=2 * rows)
    _refuse_missing(job, job.work_items("matched"))
    return_rows(job, "matched", "vectors", rows, ["row", "vector"])


def _refuse_missing(job: LabelJob, items: list[Item]) -> None:
    def task(item: Item) -> pa.Table:
        table = read_table(item["uri"], ["image_id", "row", "vector"])
        missing = table.filter(pc.is_null(table["vector"])).sort_by("row")
        first = missing.slice(0, 1).select(["image_id", "row"])
        return first.append_column("missing", pa.array([missing.num_rows] * first.num_rows, pa.int64()))

    entries = [entry for block in blocks_of(job.map(items, task)) for entry in block.to_pylist()]
    if entries:
        first = min(entries, key=lambda entry: int(entry["row"]))
        count = sum(entry["missing"] for entry in entries)
        raise UsageError(
            f"{count} images of the corpus have no embedding, {first['image_id']!r} for one; embed the "
            "same corpus artifact that is given to the labels stage"
        )
