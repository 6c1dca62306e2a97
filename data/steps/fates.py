"""From pairs to decisions: components over all cells, the fate of each row, and its way back to the corpus parts."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.duplicates import components
from lookalike.data.duplicates.copies import FATES
from lookalike.data.duplicates.dedup import decide_fates
from lookalike.data.duplicates.pair_search import PAIRS, merge_pairs
from lookalike.data.duplicates.signatures import ROW_SHIFT
from lookalike.data.parts import Item, part_name, read_table, write_table
from lookalike.data.steps.exchange import ONE_TASK, bucket_rows, exchange, fill_columns, num_buckets, total, with_key
from lookalike.data.steps.job import LabelJob

PAIRS_IN_TASK = 2_000_000  # up to here one task decides: about 150 bytes a pair, and as much again to work
_EDGES = pa.schema([("node", pa.int64()), ("other", pa.int64())])
Rewrite = Callable[[pl.DataFrame], pl.DataFrame]
"""Edges to other edges with the same components."""


def decide(job: LabelJob, pairs: int, inside: int) -> dict[str, Any]:
    """Write ``decided/part-B``, the fates of all rows that have a twin; return their number.

    ``pairs``: how many there are; ``inside``: those between two training rows.
    """
    if pairs <= PAIRS_IN_TASK:
        uris = [item["uri"] for item in job.work_items("pairs")]
        target = storage.join(job.out.work("decided"), part_name(0))

        def decide_all(_: Item) -> list[int]:
            fates = decide_fates(merge_pairs(pa.concat_tables([PAIRS.empty_table(), *map(read_table, uris)])))
            write_table(target, fates)
            return [fates.num_rows]

        return {"fates": total(job, ONE_TASK, decide_all)[0]}
    stars = job.once("components", find_components, inside)
    _root_pairs(job, stars["stars"], pairs)
    buckets = num_buckets(pairs)

    def by_root(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return with_key(table.drop_columns(["root"]), bucket_rows(table["root"].to_numpy(), buckets))

    rooted = job.work_items("rooted")
    exchange(job, rooted, by_root, lambda bucket: decide_fates(merge_pairs(bucket)), kind="decided", rows=pairs)
    decided = job.work_items("decided")
    return {"fates": total(job, decided, lambda item: [read_table(item["uri"], ["row"]).num_rows])[0]}


def find_components(job: LabelJob, edges: int) -> dict[str, Any]:
    """Name of the work folder that ties every node to the smallest of its component, and the rounds it took."""
    first, buckets = job.out.work("stars-0"), num_buckets(edges)

    def start(item: Item) -> list[int]:
        table = read_table(item["uri"], ["row", "twin", "split"])
        inside = table.filter(table["split"].is_null())
        tied = components.contract(components.edge_frame(inside["row"].to_numpy(), inside["twin"].to_numpy()))
        write_table(storage.join(first, part_name(item["number"])), _edges(tied))
        return [components.edge_checksum(tied)]

    def star(source: str, kind: str, listed: Rewrite, tie: Rewrite, rows: int) -> None:
        def spread(item: Item) -> pa.Table:
            edges = listed(_read_edges(item))
            return with_key(_edges(edges), bucket_rows(edges["node"].to_numpy(), buckets))

        def gather(edges: pa.Table) -> pa.Table:
            return _edges(tie(pl.DataFrame(edges)))

        exchange(job, job.work_items(source), spread, gather, kind=kind, rows=rows)

    before, rounds = total(job, job.work_items("pairs"), start), 0
    while True:
        star(f"stars-{rounds}", f"large-{rounds}", components.both_ways, components.large_star, 2 * edges)
        star(f"large-{rounds}", f"stars-{rounds + 1}", components.downwards, components.small_star, edges)
        rounds += 1
        after = total(
            job, job.work_items(f"stars-{rounds}"), lambda item: [components.edge_checksum(_read_edges(item))]
        )
        if after == before:
            return {"stars": f"stars-{rounds}", "rounds": rounds}
        before = after


def _read_edges(item: Item) -> pl.DataFrame:
    return pl.DataFrame(read_table(item["uri"]))


def _edges(edges: pl.DataFrame) -> pa.Table:
    return edges.select(_EDGES.names).to_arrow().cast(_EDGES)


def _root_pairs(job: LabelJob, stars: str, pairs: int) -> None:
    """Write ``rooted/part-B``: the pairs with the ``root`` of their row's component."""
    buckets = num_buckets(2 * pairs)
    schema = pa.schema([field.with_nullable(True) for field in PAIRS] + [pa.field("root", pa.int64())])

    def spread(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        if item["kind"] == "stars":
            table = table.rename_columns(["row", "root"])
        return with_key(fill_columns(table, schema), bucket_rows(table["row"].to_numpy(), buckets))

    def join(table: pa.Table) -> pa.Table:
        frame = pl.DataFrame(table)
        roots = frame.filter(pl.col("twin").is_null()).select("row", "root").unique()
        rows = frame.filter(pl.col("twin").is_not_null()).drop("root").join(roots, on="row", how="left")
        rows = rows.with_columns(root=pl.col("root").fill_null(pl.col("row")))
        return rows.select(schema.names).to_arrow().cast(schema)

    items = [{**item, "kind": "pairs"} for item in job.work_items("pairs")]
    items += [{**item, "kind": "stars"} for item in job.work_items(stars)]
    exchange(job, items, spread, join, kind="rooted", rows=2 * pairs)


def send_fates(job: LabelJob, rows: int) -> None:
    """Write ``fates/part-N``: the fates of part N's own rows and of the leaders, in other parts, of its copies.

    Copies ask the part of their leader, which answers with the fates of its own rows: two shuffles of the ``rows`` rows
    that have a twin or are a copy. ``to`` is the part that gets a row, ``asks`` marks a question.
    """
    schema = pa.schema([*(field.with_nullable(True) for field in FATES), ("to", pa.int64()), ("asks", pa.bool_())])

    def ask(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        asks = item["kind"] == "copies"
        if asks:  # copies that follow a training row ask for the fate of their leader
            leaders = table.filter(table["split"].is_null())["leader"]
            table = pa.table({"row": leaders, "to": pa.repeat(item["number"], len(leaders))})
        else:
            table = table.append_column("to", pc.shift_right(table["row"], ROW_SHIFT))
        table = table.append_column("asks", pa.repeat(asks, table.num_rows))
        return with_key(fill_columns(table, schema), table["row"].to_numpy() >> ROW_SHIFT)

    def answer(table: pa.Table) -> pa.Table:
        frame = pl.DataFrame(table)
        own = frame.filter(~pl.col("asks")).drop("asks")
        answers = frame.filter("asks").select("row", "to").unique().join(own.drop("to"), on="row")
        both = pl.concat([own, answers.select(own.columns)]).unique(["row", "to"])
        return both.to_arrow().cast(schema.remove(schema.get_field_index("asks")))

    def deliver(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return with_key(table.drop_columns(["to"]), table["to"].to_numpy())

    items = [{**item, "kind": kind} for kind in ("decided", "copies") for item in job.work_items(kind)]
    exchange(job, items, ask, answer, kind="answers", rows=rows)
    answers = job.work_items("answers")
    exchange(job, answers, deliver, lambda part: part.sort_by("row").cast(FATES), kind="fates", rows=rows)
