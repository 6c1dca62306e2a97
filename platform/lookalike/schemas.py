"""Arrow schemas of the tables that pass between stages. A stage may add columns but not drop these."""

import pyarrow as pa

from lookalike.errors import ArtifactError

CORPUS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # unique within the corpus
        pa.field("image", pa.binary()),  # encoded bytes (JPEG, PNG, WebP ...)
        pa.field("title", pa.string()),
        pa.field("description", pa.string()),
        pa.field("keywords", pa.list_(pa.string())),
        # terms of the user's own keyword model, scores in [0, 1]; empty if the source has none
        pa.field("annotations", pa.list_(pa.struct([("term", pa.string()), ("score", pa.float32())]))),
        # terms of what people did with the image (queries, names of boards), weights >= 0; empty if none
        pa.field("interactions", pa.list_(pa.struct([("term", pa.string()), ("weight", pa.float32())]))),
        # facts of a catalogue (colour, material), each pair once, sorted; empty if none
        pa.field("attributes", pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))),
        pa.field("category", pa.string()),  # a path, parts separated by "/"
        pa.field("locale", pa.string()),  # language hint, for example "en"
        pa.field("group", pa.string()),  # product or instance; null when unknown
        pa.field("view", pa.string()),  # for example "icon" or "front"
        pa.field("split", pa.string()),  # "train"; any other split is held out from all training
        pa.field("dataset", pa.string()),  # the source of the row
        pa.field("creator", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)
"""One row per accepted image. ``corpus/part-*.parquet``."""

QUARANTINE = pa.schema(
    [
        pa.field("image_id", pa.string()),  # as given, escaped, where it is no fit id
        pa.field("source", pa.string()),  # file the record came from
        pa.field("row", pa.int64()),  # its number among the records there, from 0
        pa.field("field", pa.string()),  # the bad field; "record" if the whole record is unreadable
        pa.field("reason", pa.string()),
        pa.field("uri", pa.string()),  # what the record names as its image, escaped; null if nothing
        pa.field("detail", pa.string()),  # what was found, and what to do about it
    ]
)
"""One row per refused record, or per repaired field of an accepted record ("repaired: ..."). ``quarantine.parquet``."""

SHARD = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("labels", pa.list_(pa.int32())),  # weak labels: columns of the classifier; empty if none
        pa.field("category", pa.int32()),  # class of the category task; -1 when unknown
        pa.field("group", pa.int32()),  # class of the identity task; -1 when unknown
        pa.field("attributes", pa.list_(pa.int32())),  # classes of the attributes in classes.json; -1 when unknown
        pa.field("repeat", pa.float32()),  # r(I) >= 1: expected copies per epoch
    ]
)
"""One row per training image. ``<dataset>/part-*.parquet``; ``classes.json`` names the classes."""


CARRIED = ("group", "view", "split", "dataset", "category", "title")
"""Columns that an embeddings artifact copies from the corpus."""


def embeddings(dim: int, float16: bool = False) -> pa.Schema:
    """Schema of an embeddings artifact."""
    value = pa.float16() if float16 else pa.float32()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(value, dim), nullable=False),
            *(pa.field(name, pa.string()) for name in CARRIED),
        ]
    )


def require_columns(table: pa.Table, schema: pa.Schema, where: str) -> None:
    """Raise ``ArtifactError`` unless ``table`` has every column of ``schema``."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ArtifactError(f"{where} lacks columns {missing}; it has {table.column_names}")
