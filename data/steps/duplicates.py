"""Signatures and near-duplicates: ``duplicates.parquet``."""

from typing import Any

import pyarrow as pa

from lookalike import storage
from lookalike.data.dedup import SIGNATURES, find_duplicates, sign_images
from lookalike.data.features import align, project_part
from lookalike.data.parts import Item, blocks_of, part_items, part_name, read_table, write_table
from lookalike.data.steps.job import LabelJob
from lookalike.errors import UsageError

_DONE = pa.schema([("number", pa.int64())])


def sign(job: LabelJob) -> dict[str, Any]:
    """Signatures of all images and small copies of all embeddings, as parts in the draft's work folder."""
    work, dim, seed = job.out.work(), job.config.feature_dim, job.config.seed
    vectors = part_items(job.embeddings.files("part-", ".parquet"))
    items = [{**item, "kind": "signatures"} for item in job.parts] + [{**i, "kind": "features"} for i in vectors]

    def task(item: Item) -> pa.Table:
        target = storage.join(work, item["kind"], part_name(item["number"]))
        if not storage.exists(target):
            if item["kind"] == "signatures":
                table = sign_images(read_table(item["uri"], ["image_id", "image", "group", "split"]))
            else:
                table = project_part(read_table(item["uri"], ["image_id", "vector"]), dim, seed)
            write_table(target, table)
        return pa.table([[item["number"]]], schema=_DONE)

    return {"parts": sum(block.num_rows for block in blocks_of(job.map(items, task)))}


def find(job: LabelJob) -> dict[str, Any]:
    """``duplicates.parquet``: the training rows to drop. Holds one signature and one feature an image."""
    signatures = pa.concat_tables([SIGNATURES.empty_table(), *map(read_table, job.work_parts("signatures"))])
    features = pa.concat_tables([read_table(uri) for uri in job.work_parts("features")])
    vectors = align(features, signatures["image_id"].to_pylist())
    duplicates = find_duplicates(signatures, vectors, job.config.dedup)
    write_table(job.out.path("duplicates.parquet"), duplicates)
    reasons = duplicates.group_by("reason").aggregate([([], "count_all")]).to_pylist()
    splits = signatures.group_by("split").aggregate([([], "count_all")]).to_pylist()
    counts = {str(e["reason"]): e["count_all"] for e in reasons}
    if duplicates.num_rows >= sum(e["count_all"] for e in splits if e["split"] == "train"):
        raise UsageError(f"no training row is left: split 'train' lost all its rows as {counts or 'it has none'}; "
                         "give training rows, or set dedup.hold_out_groups=false where held-out pictures show "
                         "products that are trained on")  # fmt: skip
    return {"rows": {e["split"]: e["count_all"] for e in splits}, "dropped": duplicates.num_rows,
            "reasons": dict(sorted(counts.items()))}
