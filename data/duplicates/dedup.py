"""Which training rows go: near-duplicates of each other, and twins of any held-out row (the leak firewall).

Training rows with a twin in another split go. Among the others, pairs close into components, and inside a component the
rows are taken in corpus order: a row stays unless one of its twins has stayed. So every dropped row has a verified
twin, and a chain of small differences does not swallow a family of pictures.

Views of a product are not duplicates of each other, and two products of a catalogue that look alike are signal, not
noise: between rows that both have a group only equal bytes count. This exception does not hold against held-out rows.
"""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.duplicates.components import connected
from lookalike.data.duplicates.copies import (
    FATES,
    find_copies,
    find_leaders,
    held_out_groups,
    select_searched,
    settle_part,
)
from lookalike.data.duplicates.pair_search import merge_pairs, search_cell
from lookalike.data.duplicates.signatures import ROW_SHIFT
from lookalike.data.duplicates.twins import DedupConfig

COPIES_WITHIN = ("duplicate", "near_duplicate")  # reasons of rows whose twin is a kept training row
LENT = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("keeper_id", pa.string(), nullable=False),
        pa.field("keeper", pa.int64(), nullable=False),
    ]
)
"""A dropped copy and the row that inherits its words."""


def decide_fates(pairs: pl.DataFrame) -> pa.Table:
    """``FATES`` of all training rows in ``pairs`` (of :func:`merge_pairs`), which hold whole components."""
    across = pairs.filter(pl.col("split").is_not_null())
    inside = pairs.filter(pl.col("split").is_null())
    nodes, smallest = connected(inside["row"].to_numpy(), inside["twin"].to_numpy())
    ids = pl.concat([pairs.select("row", image_id="row_id"), inside.select(row="twin", image_id="twin_id")]).unique()
    roots = pl.DataFrame({"row": nodes, "root": smallest}, schema={"row": pl.Int64, "root": pl.Int64})
    rows = ids.join(roots, on="row", how="left").with_columns(root=pl.col("root").fill_null(pl.col("row")))
    rows = rows.join(ids.select(root="row", component="image_id"), on="root").select("row", "component")
    overlaps = across.with_columns(reason=pl.lit("overlaps_test"))
    drops = _drop_later_twins(inside, set(across["row"].to_list()))
    near = inside.filter(pl.Series(drops, dtype=pl.Boolean)).with_columns(
        reason=pl.when("same").then(pl.lit("duplicate")).otherwise(pl.lit("near_duplicate"))
    )
    twins = pl.concat([overlaps, near]).rename({"twin": "keeper", "twin_id": "keeper_id"})
    return rows.join(twins, on="row", how="left").sort("row").select(FATES.names).to_arrow().cast(FATES)


def _drop_later_twins(inside: pl.DataFrame, gone: set[int]) -> list[bool]:
    """Whether each pair, by row and then twin, drops its row: the first pair whose twin stays does."""
    gone = set(gone)
    drops = []
    for row, twin in inside.select("row", "twin").iter_rows():
        drop = row not in gone and twin not in gone
        drops.append(drop)
        if drop:
            gone.add(row)
    return drops


def find_duplicates(signatures: pa.Table, config: DedupConfig) -> pa.Table:
    """``DROPPED`` of a corpus that one task holds: it compares all rows."""
    held_groups = held_out_groups(signatures) if config.hold_out_groups else set()
    copies = find_copies(find_leaders(signatures, held_groups))
    pairs = search_cell(select_searched(signatures, held_groups, copies), config)
    return settle_part(signatures, held_groups, copies, decide_fates(merge_pairs(pairs)))


def split_parts(dropped: pa.Table, parts: int) -> Iterator[tuple[int, pa.Table]]:
    """Each of the ``parts`` corpus parts with its ``DROPPED`` rows."""
    number = pc.shift_right(dropped["row"], ROW_SHIFT)
    for part in range(parts):
        yield part, dropped.filter(pc.equal(number, part))


def lent_rows(dropped: pa.Table) -> pa.Table:
    """``LENT`` of ``DROPPED`` rows; rows dropped because of a held-out split lend nothing."""
    copies = dropped.filter(pc.is_in(dropped["reason"], pa.array(COPIES_WITHIN)))
    return copies.select(LENT.names).cast(LENT)


def keep_training(rows: pa.Table, duplicates: pa.Table) -> pa.Table:
    """The training rows of a corpus part without the part's ``duplicates``."""
    train = pc.equal(rows["split"], "train")
    dropped = pc.is_in(rows["image_id"], value_set=duplicates["image_id"].combine_chunks())
    return rows.filter(pc.and_(train, pc.invert(dropped)))


def borrow(annotations: pa.Table, lent: pa.Table) -> pa.Table:
    """Annotations of a part's dropped copies under the id and row number (``keeper``) of the row that stays.

    A picture keeps what any of its copies was called.
    """
    frame = pl.DataFrame(annotations).join(pl.DataFrame(lent), on="image_id")
    words = frame.with_columns(image_id=pl.col("keeper_id")).select(*annotations.column_names, "keeper")
    return words.to_arrow().cast(pa.schema([*annotations.schema, LENT.field("keeper")]))
