"""Components over all cells, the decision in each, and its way back to the parts: ``fates/part-N``."""

from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.duplicates.components import (
    both_ways,
    contract,
    downwards,
    edge_checksum,
    edge_frame,
    large_star,
    small_star,
)
from lookalike.data.duplicates.copies import FATES
from lookalike.data.duplicates.dedup import decide_fates
from lookalike.data.duplicates.pair_search import PAIRS, merge_pairs
from lookalike.data.duplicates.signatures import ROW_SHIFT
from lookalike.data.parts import Item, blocks_of, part_name, read_table, write_table
from lookalike.data.steps.exchange import (
    as_frame,
    bucket_rows,
    exchange,
    num_buckets,
    total,
    with_key,
    work_items,
)
from lookalike.data.steps.job import LabelJob

PAIRS_IN_TASK = 2_000_000  # up to here one task decides: about 150 bytes a pair, and as much again to work
_EDGES = pa.schema([("node", pa.int64()), ("other", pa.int64())])


def decide(job: LabelJob, pairs: int, inside: int) -> dict[str, Any]:
    """``decided/part-B``: the fates of all rows that have a twin; ``inside`` of the ``pairs`` join training rows."""
    if pairs <= PAIRS_IN_TASK:
        uris = [item["uri"] for item in work_items(job, "pairs")]
        target = storage.join(job.out.work("decided"), part_name(0))

        def whole(_: Item) -> pa.Table:
            found = pa.concat_tables([PAIRS.empty_table(), *map(read_table, uris)])
            fates = decide_fates(merge_pairs(found))
            write_table(target, fates)
            return pa.table({"rows": [fates.num_rows]})

        return {"fates": sum(block["rows"][0].as_py() for block in blocks_of(job.map([{"number": 0}], whole)))}
    stars = job.once("components", find_components, inside)
    _root_pairs(job, stars["stars"], pairs)
    buckets = num_buckets(pairs)

    def by_root(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return with_key(table.drop_columns(["root"]), bucket_rows(table["root"].to_numpy(), buckets))

    exchange(
        job,
        work_items(job, "rooted"),
        by_root,
        lambda _, found: decide_fates(merge_pairs(found)),
        kind="decided",
        rows=pairs,
    )
    return {"fates": total(job, work_items(job, "decided"), _num_rows)[0]}


def _num_rows(item: Item) -> list[int]:
    return [read_table(item["uri"], ["row"]).num_rows]


def find_components(job: LabelJob, edges: int) -> dict[str, Any]:
    """The work folder's name that ties every node, but the smallest of its component, to the smallest."""
    pairs, first = work_items(job, "pairs"), job.out.work("stars-0")
    buckets = num_buckets(edges)

    def start(item: Item) -> list[int]:
        table = read_table(item["uri"], ["row", "twin", "split"])
        inside = table.filter(table["split"].is_null())
        tied = contract(edge_frame(inside["row"].to_numpy(), inside["twin"].to_numpy()))
        write_table(storage.join(first, part_name(item["number"])), tied.to_arrow().cast(_EDGES))
        return [edge_checksum(tied)]

    before, turn = total(job, pairs, start), 0

    def large(item: Item) -> pa.Table:
        return _by_node(both_ways(as_frame(read_table(item["uri"]))), buckets)

    def small(item: Item) -> pa.Table:
        return _by_node(downwards(as_frame(read_table(item["uri"]))), buckets)

    while True:
        exchange(
            job,
            work_items(job, f"stars-{turn}"),
            large,
            lambda _, t: _edges(large_star(as_frame(t))),
            kind=f"large-{turn}",
            rows=2 * edges,
        )
        turn += 1
        exchange(
            job,
            work_items(job, f"large-{turn - 1}"),
            small,
            lambda _, t: _edges(small_star(as_frame(t))),
            kind=f"stars-{turn}",
            rows=edges,
        )
        after = total(
            job, work_items(job, f"stars-{turn}"), lambda item: [edge_checksum(as_frame(read_table(item["uri"])))]
        )
        if after == before:
            return {"stars": f"stars-{turn}", "rounds": turn}
        before = after


def _by_node(edges: pl.DataFrame, buckets: int) -> pa.Table:
    return with_key(_edges(edges), bucket_rows(edges["node"].to_numpy(), buckets))


def _edges(edges: pl.DataFrame) -> pa.Table:
    return edges.select(_EDGES.names).to_arrow().cast(_EDGES)


def _root_pairs(job: LabelJob, stars: str, pairs: int) -> None:
    """``rooted/part-B``: the pairs with the ``root`` of their row's component."""
    buckets = num_buckets(2 * pairs)
    schema = pa.schema([field.with_nullable(True) for field in PAIRS] + [pa.field("root", pa.int64())])

    def spread(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        if item["kind"] == "stars":
            table = pa.table({"row": table["node"], "root": table["other"]})
        columns = [
            table[f.name].combine_chunks() if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
            for f in schema
        ]
        return with_key(pa.table(columns, schema=schema), bucket_rows(table["row"].to_numpy(), buckets))

    def join(_: int, found: pa.Table) -> pa.Table:
        frame = as_frame(found)
        roots = frame.filter(pl.col("twin").is_null()).select("row", "root").unique()
        rows = frame.filter(pl.col("twin").is_not_null()).drop("root").join(roots, on="row", how="left")
        rows = rows.with_columns(root=pl.col("root").fill_null(pl.col("row")))
        return rows.select(schema.names).to_arrow().cast(schema)

    items = [
        {**item, "kind": kind}
        for kind, folder in (("pairs", "pairs"), ("stars", stars))
        for item in work_items(job, folder)
    ]
    exchange(job, items, spread, join, kind="rooted", rows=2 * pairs)


def send_fates(job: LabelJob, rows: int) -> None:
    """``fates/part-N``: the fates of part N's own rows and of the leaders, in other parts, of its copies.

    Copies ask the part of their leader, which answers from its own rows' fates: two shuffles of the rows that have a
    twin or are a copy.
    """
    schema = pa.schema([*(field.with_nullable(True) for field in FATES), ("to", pa.int64()), ("asks", pa.bool_())])

    def collect_both(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        if item["kind"] == "copies":  # those that follow a training row
            leader = table.filter(table["split"].is_null())["leader"]
            table = pa.table(
                {
                    "row": leader,
                    "to": pa.array([item["number"]] * len(leader), pa.int64()),
                    "asks": pa.array([True] * len(leader), pa.bool_()),
                }
            )
        else:
            table = table.append_column("to", pc.shift_right(table["row"], ROW_SHIFT))
            table = table.append_column("asks", pa.array([False] * table.num_rows, pa.bool_()))
        columns = [
            table[f.name].combine_chunks() if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
            for f in schema
        ]
        return with_key(pa.table(columns, schema=schema), table["row"].to_numpy() >> ROW_SHIFT)

    def answer(_: int, found: pa.Table) -> pa.Table:
        frame = as_frame(found)
        own = frame.filter(~pl.col("asks")).drop("asks")
        asked = frame.filter("asks").select("row", "to").unique().join(own.drop("to"), on="row")
        both = pl.concat([own, asked.select(own.columns)]).unique(["row", "to"])
        return both.to_arrow().cast(schema.remove(schema.get_field_index("asks")))

    def gather(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return with_key(table.drop_columns(["to"]), table["to"].to_numpy())

    items = [{**item, "kind": kind} for kind in ("decided", "copies") for item in work_items(job, kind)]
    exchange(job, items, collect_both, answer, kind="answers", rows=rows)
    exchange(
        job,
        work_items(job, "answers"),
        gather,
        lambda _, part: part.sort_by("row").cast(FATES),
        kind="fates",
        rows=rows,
    )
