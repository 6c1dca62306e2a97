"""Text fields of corpus records as rows: which record says which text, and how strongly."""

import polars as pl
import pyarrow as pa

MAX_ENTRIES = 1000
"""Entries read of a list."""
SCORES = {"interactions": "weight", "annotations": "score"}
"""Fields that are lists of scored terms, and the name of the score."""


def read_fields(records: pa.Table, names: list[str]) -> pl.DataFrame:
    """One row per entry of the named fields: ``row`` of the record, ``field``, ``text``, ``strength``, ``locale``.

    Each part of the path in ``category`` is an entry. ``strength`` is a score cut to [0, 1], and 1 where the field has
    no scores. Entries that are null, and scored terms without a finite score, are left out.
    """
    frame = pl.DataFrame(records)
    absent = [pl.lit(None, pl.String).alias(name) for name in (*names, "locale") if name not in frame.columns]
    frame = frame.with_columns(absent)
    return pl.concat([_read_field(frame, name) for name in names])


def _read_field(records: pl.DataFrame, name: str) -> pl.DataFrame:
    text = pl.col(name).str.split("/") if name == "category" else pl.col(name)
    entries = records.select(
        row=pl.int_range(pl.len(), dtype=pl.Int64),
        field=pl.lit(name),
        text=text,
        strength=pl.lit(1.0),
        locale=pl.col("locale").cast(pl.String),
    )
    if isinstance(entries["text"].dtype, pl.List):
        entries = entries.with_columns(pl.col("text").list.head(MAX_ENTRIES)).explode("text")
    if isinstance(entries["text"].dtype, pl.Struct):
        term = pl.col("text").struct
        entries = entries.with_columns(text=term["term"], strength=term[SCORES[name]].cast(pl.Float64).clip(0, 1))
        entries = entries.filter(pl.col("strength").is_finite())
    return entries.with_columns(pl.col("text").cast(pl.String)).drop_nulls("text")
