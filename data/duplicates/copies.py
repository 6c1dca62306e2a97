"""Pictures with equal bytes: only the first of them is searched, the others follow it.

Rows form a class when they have the same bytes and split and, in training, either all or none has a group: then every
rule treats them alike. Training rows whose group is held out take no part. Each corpus part names the first row of
every class, one shuffle by content finds the leader, the first row of all, and the decision on the leader holds for the
whole class. A picture with a hundred million copies is thus one row a part in the shuffle and one row in the search.
"""

from collections.abc import Set

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

LIGHT = ["image_id", "row", "content", "group", "split"]
_ID, _ROW = pa.field("image_id", pa.string(), nullable=False), pa.field("row", pa.int64(), nullable=False)
LEADERS = pa.schema([_ID, _ROW, ("content", pa.binary(16)), ("grouped", pa.bool_()), ("split", pa.string())])
"""The first row of every class of a part."""
COPIES = pa.schema(
    [
        _ROW,
        pa.field("leader", pa.int64(), nullable=False),
        pa.field("leader_id", pa.string(), nullable=False),
        pa.field("component", pa.string(), nullable=False),
        pa.field("split", pa.string()),
    ]
)
"""A part's first row of a class that is not searched: it follows the ``leader`` of its class in an earlier part, or its
bytes equal those of the held-out row ``leader`` of ``split``. ``component``: id of the first training row with these
bytes."""
FATES = pa.schema(
    [
        _ROW,
        pa.field("keeper", pa.int64()),
        pa.field("keeper_id", pa.string()),
        pa.field("component", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("split", pa.string()),
        pa.field("bits", pa.int32()),
        pa.field("cosine", pa.float32()),
    ]
)
"""The decision on a row that has a twin; ``reason`` is null when the row stays."""
_OF_TWIN = [FATES.field(name) for name in ("split", "bits", "cosine")]
DUPLICATES = pa.schema(
    [_ID, *map(FATES.field, ("keeper_id", "component")), FATES.field("reason").with_nullable(False), *_OF_TWIN]
)
"""One row per dropped training image, in corpus order.

``keeper_id``: its twin that stays or is held out. ``component``: the first image, in corpus order, of its connected
component. ``reason``: ``duplicate`` (equal bytes), ``near_duplicate``, ``overlaps_test`` (a twin of a row of the
held-out ``split``) or ``group_in_test``. ``bits`` and ``cosine`` say how close the twin is; ``bits`` is the smaller of
the distances with and without margins.
"""
DROPPED = pa.schema([*DUPLICATES, pa.field("row", pa.int64()), pa.field("keeper", pa.int64())])

_CLASS = ["content", "split", "grouped"]


def held_out_groups(signatures: pa.Table) -> set[str]:
    """Groups of the rows outside the training split."""
    held_out = signatures.filter(pc.not_equal(signatures["split"], "train"))
    return set(held_out["group"].drop_null().unique().to_pylist())


def _classed(signatures: pa.Table, held_groups: Set[str]) -> pl.DataFrame:
    """The rows that take part, each with number and id of the first row of its class."""
    frame = pl.DataFrame(signatures.select(LIGHT)).sort("row")
    train = pl.col("split") == "train"
    out = train & pl.col("group").is_in(list(held_groups)).fill_null(value=False)
    frame = frame.filter(~out).with_columns(grouped=train & pl.col("group").is_not_null())
    return frame.with_columns(pl.col("row", "image_id").first().over(_CLASS).name.prefix("first_"))


def find_leaders(signatures: pa.Table, held_groups: Set[str]) -> pa.Table:
    """``LEADERS`` of a part; ``held_groups``: the groups whose training rows are dropped."""
    frame = _classed(signatures, held_groups)
    return frame.filter(pl.col("row") == pl.col("first_row")).select(LEADERS.names).to_arrow().cast(LEADERS)


def find_copies(leaders: pa.Table) -> pa.Table:
    """``COPIES`` among the ``LEADERS`` of all parts, or among those whose contents fall into one bucket."""
    frame = pl.DataFrame(leaders).sort("row")
    train = frame.filter(pl.col("split") == "train")
    first = frame.unique(_CLASS, keep="first").select(*_CLASS, leader="row", leader_id="image_id")
    test = (
        frame.filter(pl.col("split") != "train")
        .unique("content", keep="first")
        .select("content", test="row", test_id="image_id", test_split="split")
    )
    component = train.unique("content", keep="first").select("content", component="image_id")
    joined = frame.join(first, on=_CLASS).join(component, on="content", how="left").join(test, on="content", how="left")
    overlaps = (pl.col("split") == "train") & pl.col("test").is_not_null()
    copies = joined.filter(overlaps | (pl.col("row") != pl.col("leader"))).select(
        "row",
        leader=pl.when(overlaps).then("test").otherwise("leader"),
        leader_id=pl.when(overlaps).then("test_id").otherwise("leader_id"),
        component=pl.col("component").fill_null(pl.col("leader_id")),
        split=pl.when(overlaps).then("test_split"),
    )
    return copies.sort("row").to_arrow().cast(COPIES)


def select_searched(signatures: pa.Table, held_groups: Set[str], copies: pa.Table) -> pa.Table:
    """The rows of a part that are searched: the first of their class in the whole corpus."""
    leaders = find_leaders(signatures, held_groups)
    apart = pc.is_in(leaders["row"], value_set=copies["row"].combine_chunks())
    return signatures.filter(pc.is_in(signatures["row"], value_set=leaders.filter(pc.invert(apart))["row"]))


def settle_part(signatures: pa.Table, held_groups: Set[str], copies: pa.Table, fates: pa.Table) -> pa.Table:
    """``DROPPED`` of a part, from the fates of its rows and of the leaders that they follow.

    ``copies``: those of the part; ``fates``: those of its searched rows and of the leaders of its copies.
    """
    follow = pl.DataFrame(copies).rename({"row": "first_row", "component": "own", "split": "test"})
    joined = (
        _classed(signatures, held_groups)
        .filter(pl.col("split") == "train")
        .drop("split")
        .join(follow, on="first_row", how="left")
        .with_columns(
            leader=pl.col("leader").fill_null(pl.col("first_row")),
            leader_id=pl.col("leader_id").fill_null(pl.col("first_image_id")),
        )
        .join(pl.DataFrame(fates).rename({"row": "leader"}), on="leader", how="left")
    )
    equal, follows = pl.col("test").is_not_null(), pl.col("reason").is_null() & (pl.col("row") != pl.col("leader"))
    to_leader = equal | follows
    settled = joined.filter(to_leader | pl.col("reason").is_not_null()).select(
        "image_id",
        keeper_id=pl.when(to_leader).then("leader_id").otherwise("keeper_id"),
        component=pl.when(equal).then("own").otherwise(pl.coalesce("component", "leader_id")),
        reason=pl.when(equal).then(pl.lit("overlaps_test")).when(follows).then(pl.lit("duplicate")).otherwise("reason"),
        split=pl.when(equal).then("test").otherwise("split"),
        bits=pl.when(to_leader).then(0).otherwise("bits").cast(pl.Int32),
        cosine=pl.when(to_leader).then(1.0).otherwise("cosine").cast(pl.Float32),
        row="row",
        keeper=pl.when(to_leader).then("leader").otherwise("keeper"),
    )
    frame = pl.DataFrame(signatures.select(LIGHT))
    out = frame.filter((pl.col("split") == "train") & pl.col("group").is_in(list(held_groups)).fill_null(value=False))
    gone = out.select("image_id", "row", component="image_id", reason=pl.lit("group_in_test"))
    return pl.concat([settled, gone], how="diagonal").sort("row").select(DROPPED.names).to_arrow().cast(DROPPED)
