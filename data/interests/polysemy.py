"""Terms with several senses, and how interest restriction told their pictures apart.

A term is polysemous if it belongs to several interests, whether or not the visual dictionary keeps it. For each of its
interests the images are counted that kept only this sense, that kept it beside another, and that lost it.
"""

import polars as pl
import pyarrow as pa

SENSES = pa.schema([("term", pa.string()), ("interest", pa.string()), ("alone", pa.int64()), ("beside", pa.int64())])
POLYSEMY = pa.schema([*SENSES, ("removed", pa.int64())])
"""One row per term and sense: images with only this sense, with this and another sense, and without it."""


def senses_left(assigned: pa.Table) -> pl.DataFrame:
    """One row per image, polysemous term and interest that was kept: image_id, term, interest, alone."""
    frame = pl.DataFrame(assigned.select(["image_id", "senses"])).explode("senses").drop_nulls("senses")
    senses = frame.unnest("senses").with_columns(alone=pl.col("interests").list.len() == 1)
    return senses.explode("interests").rename({"interests": "interest"})


def count_senses(assigned: pa.Table) -> pa.Table:
    """``SENSES`` of a part; parts add up. The row with the empty interest counts all images of the term."""
    left = senses_left(assigned)
    by_sense = left.drop_nulls("interest").group_by("term", "interest")
    named = by_sense.agg(alone=pl.col("alone").sum(), beside=(~pl.col("alone")).sum())
    images = left.group_by("term").agg(alone=pl.col("image_id").n_unique())
    images = images.with_columns(interest=pl.lit(""), beside=pl.lit(0))
    both = [frame.select(SENSES.names).cast({"alone": pl.Int64, "beside": pl.Int64}) for frame in (named, images)]
    return pl.concat(both).to_arrow().cast(SENSES)


def describe_senses(counts: pa.Table) -> pa.Table:
    """``POLYSEMY`` from the sum of all ``SENSES``; terms with the most images told apart come first."""
    frame = pl.DataFrame(counts)
    images = frame.filter(pl.col("interest") == "").select("term", images="alone")
    named = (
        frame.filter(pl.col("interest") != "")
        .join(images, on="term")
        .with_columns(removed=pl.col("images") - pl.col("alone") - pl.col("beside"))
    )
    told_apart = pl.col("alone").sort(descending=True).slice(1).sum().over("term")  # images of all senses but the first
    order = named.with_columns(apart=told_apart).sort(
        ["apart", "term", "alone", "interest"], descending=[True, False, True, False]
    )
    return order.select(POLYSEMY.names).to_arrow().cast(POLYSEMY)


def separated(senses: pa.Table, min_images: int) -> dict[str, list[str]]:
    """Term -> its interests that are alone on at least ``min_images`` images, for terms with two such interests."""
    grouped: dict[str, list[str]] = {}
    for row in senses.to_pylist():
        if row["alone"] >= min_images:
            grouped.setdefault(row["term"], []).append(row["interest"])
    return {term: interests for term, interests in grouped.items() if len(interests) > 1}
