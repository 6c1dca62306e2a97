"""Near-duplicates: ``duplicates.parquet/part-N``, the training rows of corpus part N that are dropped.

One task compares a whole corpus of up to ``dedup.exact_rows`` images; a larger one is compared in cells, by shuffles
(``cells``, ``fates``). Both ways call the same functions, and with one cell they give the same rows.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lookalike import storage
from lookalike.data.duplicates.copies import COPIES, DUPLICATES, FATES, settle_part
from lookalike.data.duplicates.dedup import COPIES_WITHIN, LENT, borrow, find_duplicates, lent_rows, split_parts
from lookalike.data.duplicates.signatures import ROW_SHIFT, signature_schema
from lookalike.data.duplicates.twins import DedupConfig, judge_pairs, pictures_of
from lookalike.data.parts import Item, blocks_of, broadcast, collect, part_name, read_table, write_table
from lookalike.data.steps import cells, fates
from lookalike.data.steps.exchange import ONE_TASK, exchange, read_part, with_key
from lookalike.data.steps.job import LabelJob
from lookalike.data.text.annotations import ANNOTATIONS
from lookalike.errors import UsageError
from lookalike.progress import track

_COUNTS = pa.schema([("reason", pa.string()), ("split", pa.string()), ("rows", pa.int64())])


def find(job: LabelJob, splits: dict[str, int]) -> dict[str, Any]:
    """Write ``duplicates.parquet`` and, in the work folder, ``lent/part-N``; return counts by split and by reason.

    ``splits``: rows of each split.
    """
    rows, config = sum(splits.values()), job.config.dedup
    blocks = _find_whole(job) if rows <= config.exact_rows else _find_in_cells(job, rows)
    reasons: dict[str, int] = {}
    overlaps = {split: 0 for split in splits if split != "train"}
    for entry in (entry for block in blocks for entry in block.to_pylist()):
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + entry["rows"]
        if entry["split"] is not None:
            overlaps[entry["split"]] += entry["rows"]
    dropped, train = sum(reasons.values()), splits.get("train", 0)
    if dropped >= train:
        raise UsageError(
            f"no training row is left: split 'train' lost all its rows as {reasons or 'it has none'}; "
            "give training rows, or set dedup.hold_out_groups=false where held-out pictures show "
            "products that are trained on"
        )
    result = {
        "rows": splits,
        "dropped": dropped,
        "kept": train - dropped,
        "reasons": dict(sorted(reasons.items())),
        "overlaps": overlaps,
    }
    return {**result, "labelled": judge_labelled(job)} if config.labelled_pairs else result


def _write_part(out: str, work: str, number: int, dropped: pa.Table, config: DedupConfig) -> pa.Table:
    """Write both files of a part; return ``_COUNTS`` of its dropped rows."""
    if not config.within_train:
        dropped = dropped.filter(pc.invert(pc.is_in(dropped["reason"], pa.array(COPIES_WITHIN))))
    write_table(storage.join(out, "duplicates.parquet", part_name(number)), dropped.select(DUPLICATES.names))
    write_table(storage.join(work, "lent", part_name(number)), lent_rows(dropped))
    counts = dropped.group_by(["reason", "split"]).aggregate([([], "count_all")])
    return counts.rename_columns(_COUNTS.names).cast(_COUNTS)


def _find_whole(job: LabelJob) -> Iterable[pa.Table]:
    out, work, config = job.out.uri, job.out.work(), job.config.dedup
    uris = [item["uri"] for item in job.work_items("signatures")]

    def task(_: Item) -> pa.Table:
        dropped = find_duplicates(pa.concat_tables([read_table(uri) for uri in uris]), config)
        parts = split_parts(dropped, len(uris))
        return pa.concat_tables([_write_part(out, work, number, part, config) for number, part in parts])

    return track(blocks_of(job.map(ONE_TASK, task)), "labels duplicates", unit="block")


def _find_in_cells(job: LabelJob, rows: int) -> Iterable[pa.Table]:
    copies = job.once("copies", cells.split_copies, rows)["copies"]
    job.once("cells", cells.make_cells, rows)
    search = job.once("pairs", cells.search_cells, rows)
    decided = job.once("fates", fates.decide, search["pairs"], search["inside"])["fates"]
    fates.send_fates(job, decided + copies)
    out, work, config, held_groups = job.out.uri, job.out.work(), job.config.dedup, broadcast(cells.held_groups(job))

    def task(item: Item) -> pa.Table:
        number = item["number"]
        settled = settle_part(
            read_table(item["uri"]),
            held_groups(),
            read_part(storage.join(work, "copies"), number, COPIES),
            read_part(storage.join(work, "fates"), number, FATES),
        )
        return _write_part(out, work, number, settled, config)

    return track(blocks_of(job.map(job.work_items("signatures"), task)), "labels duplicates", unit="part")


def lend(job: LabelJob, reasons: dict[str, int]) -> dict[str, Any]:
    """Write ``borrowed/part-N`` of the work folder: annotations of dropped copies, at the part of the row that stays.

    ``reasons``: dropped rows by reason.
    """
    text, lent = job.out.path("annotations.parquet"), job.out.work("lent")
    copies = sum(reasons.get(reason, 0) for reason in COPIES_WITHIN)

    def spread(item: Item) -> pa.Table:
        annotations = read_part(text, item["number"], ANNOTATIONS)
        words = borrow(annotations, read_part(lent, item["number"], LENT))
        return with_key(words.drop_columns(["keeper"]), words["keeper"].to_numpy() >> ROW_SHIFT)

    def gather(words: pa.Table) -> pa.Table:
        return words.sort_by([("image_id", "ascending"), ("term", "ascending"), ("score", "ascending")])

    exchange(job, job.parts, spread, gather, kind="borrowed", rows=copies)
    return {"copies": copies}


def judge_labelled(job: LabelJob) -> dict[str, float]:
    """Precision and recall of the rule on the pairs of ``dedup.labelled_pairs``; holds their images' signatures."""
    uri, config = str(job.config.dedup.labelled_pairs), job.config.dedup
    pairs = read_labelled(uri)
    ids = pa.concat_arrays([pairs[side].combine_chunks() for side in ("left", "right")]).unique()
    wanted, items = broadcast(ids), job.work_items("signatures")

    def task(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return table.filter(pc.is_in(table["image_id"], value_set=wanted()))

    dim = read_table(items[0]["uri"], ["vector"]).schema.field("vector").type.list_size
    signatures = collect(job.map(items, task), signature_schema(dim))
    known_ids = signatures["image_id"].combine_chunks()
    missing = ids.filter(pc.invert(pc.is_in(ids, value_set=known_ids)))
    if len(missing):
        raise UsageError(
            f"dedup.labelled_pairs {uri} names {len(missing)} images that are not in the corpus, "
            f"{missing[0].as_py()!r} for one; remove their pairs"
        )
    places = [pc.index_in(pairs[side], value_set=known_ids).to_numpy() for side in ("left", "right")]
    left, right = (place.astype(np.int64) for place in places)
    return judge_pairs(pictures_of(signatures, config.mirrored), left, right, pairs["duplicate"].to_numpy(), config)


def read_labelled(uri: str) -> pa.Table:
    """Columns ``left``, ``right`` (string) and ``duplicate`` (bool) of a parquet or CSV file.

    Raises ``UsageError`` if the file has another form.
    """
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        if path.endswith(".csv"):
            with filesystem.open_input_stream(path) as stream:
                types = {"left": pa.string(), "right": pa.string()}
                options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
                table = pa.csv.read_csv(stream, convert_options=options)
        else:
            table = read_table(uri)
        columns = [
            table["left"].cast(pa.string()),
            table["right"].cast(pa.string()),
            table["duplicate"].cast(pa.int8()).cast(pa.bool_()),
        ]
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UsageError(
            f"dedup.labelled_pairs {uri} is not a table of pairs ({error}); give a parquet or CSV file with "
            "the columns left, right (image ids) and duplicate (0 or 1)"
        ) from None
    labelled = pa.table(columns, names=["left", "right", "duplicate"])
    if not labelled.num_rows or any(column.null_count for column in labelled.columns):
        raise UsageError(f"dedup.labelled_pairs {uri} has no rows, or empty cells; fill left, right and duplicate")
    return labelled
