"""Arrow schemas of the tables that stages hand to each other. A stage may add columns; it may not drop these."""

import pyarrow as pa

from lookalike.errors import ArtifactError

CORPUS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # unique within the corpus
        pa.field("image", pa.binary()),  # encoded bytes (JPEG, PNG, WebP ...)
        pa.field("title", pa.string()),
        pa.field("description", pa.string()),
        pa.field("keywords", pa.list_(pa.string())),
        # What a keyword model of the user's own found, scores in [0, 1]; empty when the source brings none.
        pa.field("annotations", pa.list_(pa.struct([("term", pa.string()), ("score", pa.float32())]))),
        # What people did with the image (queries, names of boards), weights >= 0; empty when the source brings none.
        pa.field("interactions", pa.list_(pa.struct([("term", pa.string()), ("weight", pa.float32())]))),
        # What a catalogue states (colour, material), each pair once, by name, then value; empty when there is none.
        pa.field("attributes", pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))),
        pa.field("category", pa.string()),  # a path, parts separated by "/"
        pa.field("locale", pa.string()),  # language hint, for example "en"
        pa.field("group", pa.string()),  # product or instance; null when unknown
        pa.field("view", pa.string()),  # for example "icon" or "front"
        pa.field("split", pa.string()),  # "train"; any other split is held out from all training
        pa.field("dataset", pa.string()),  # which source the row came from
        pa.field("creator", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)
"""One row an accepted image. ``corpus/part-*.parquet``."""

QUARANTINE = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("source", pa.string()),  # file the record came from
        pa.field("row", pa.int64()),  # its number among the records there, from 0
        pa.field("field", pa.string()),  # which field is bad; "record" when none could be read
        pa.field("reason", pa.string()),
    ]
)
"""One row a refused record, or a repair of a field of an accepted one ("repaired: ..."). ``quarantine.parquet``."""

SHARD = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("labels", pa.list_(pa.int32())),  # weak labels: columns of the classifier; empty when none
        pa.field("category", pa.int32()),  # class of the category task; -1 when unknown
        pa.field("group", pa.int32()),  # class of the identity task; -1 when unknown
        pa.field(
            "attributes", pa.list_(pa.int32())
        ),  # class of each attribute of classes.json, in its order; -1 unknown
        pa.field("repeat", pa.float32()),  # r(I) >= 1: expected copies an epoch
    ]
)
"""One row a training image. ``<dataset>/part-*.parquet``; ``classes.json`` names the classes."""


def embeddings(dim: int, float16: bool = False) -> pa.Schema:
    """Schema of an embeddings artifact: ids, vectors and the columns carried along from the corpus."""
    value = pa.float16() if float16 else pa.float32()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(value, dim), nullable=False),
            pa.field("group", pa.string()),
            pa.field("view", pa.string()),
            pa.field("split", pa.string()),
            pa.field("dataset", pa.string()),
            pa.field("category", pa.string()),
            pa.field("title", pa.string()),
        ]
    )


def require_columns(table: pa.Table, schema: pa.Schema, where: str) -> None:
    """Raise ``ArtifactError`` unless ``table`` has every column of ``schema``."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ArtifactError(f"{where} lacks columns {missing}; it has {table.column_names}")
