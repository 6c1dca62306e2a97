"""Contact sheets: pictures of a label, a term or a sense, chosen by hash so that a report does not flatter.

Every sheet has a key. Each part of the labels names the images of smallest hash for every wanted key, and parts merge.
The driver holds a few image ids per sheet, and the pictures that are shown.
"""

import io
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lookalike.artifacts import Artifact
from lookalike.data.interests.polysemy import senses_left
from lookalike.data.parts import Item, blocks_of, broadcast, collect, map_parts, part_items, read_table
from lookalike.sampling import stable_keys
from lookalike.vision.images import decode

CELL_PX = 96
LABEL, TERM, SENSE = "label/{}", "term/{}", "sense/{}/{}"
"""Keys of the images of a label, of a term, and of a polysemous term that kept only one interest."""
_IMAGES = pa.schema(
    [("image_id", pa.string()), ("image", pa.binary()), ("creator", pa.string()), ("licence", pa.string())]
)
_PICKS = pa.schema([("key", pa.string()), ("hash", pa.uint64()), ("image_id", pa.string())])


class Sheet(NamedTuple):
    """Key and caption of a contact sheet."""

    key: str
    caption: str


def pick_part(labels: pa.Table, annotations: pa.Table, assigned: pa.Table, *, keys: list[str], count: int) -> pa.Table:
    """``_PICKS`` of a part: for each key the ``count`` images of smallest hash; parts merge."""
    labelled = pl.DataFrame(labels.select(["image_id", "labels"])).explode("labels")
    named = pl.DataFrame(annotations.select(["image_id", "term", "split"])).filter(pl.col("split") == "train")
    images = pl.concat(
        [
            labelled.select("image_id", key=pl.format(LABEL, "labels")),
            named.select("image_id", key=pl.format(TERM, "term")),
            senses_left(assigned).filter("alone").select("image_id", key=pl.format(SENSE, "term", "interest")),
        ]
    ).filter(pl.col("key").is_in(list(keys)))
    hashes = pl.Series("hash", stable_keys(images["image_id"].to_list()), dtype=pl.UInt64)
    return smallest(images.with_columns(hashes).select(_PICKS.names), count)


def smallest(frame: pl.DataFrame, count: int) -> pa.Table:
    """The ``count`` rows of smallest hash of each key."""
    ranked = frame.unique().sort("key", "hash", "image_id").filter(pl.int_range(pl.len()).over("key") < count)
    return ranked.to_arrow().cast(_PICKS)


def pick_images(items: Sequence[Item], keys: list[str], count: int) -> dict[str, list[str]]:
    """Key -> ids of its pictures; ``items`` name the files ``labels``, ``text`` and ``assigned`` of each part."""

    def task(item: Item) -> pa.Table:
        labels, annotations, assigned = (read_table(item[name]) for name in ("labels", "text", "assigned"))
        return pick_part(labels, annotations, assigned, keys=keys, count=count)

    merged = reduce(
        lambda a, b: smallest(pl.DataFrame(pa.concat_tables([a, b])), count),
        blocks_of(map_parts(items, task)),
        _PICKS.empty_table(),
    )
    picks: dict[str, list[str]] = {}
    for row in merged.to_pylist():
        picks.setdefault(row["key"], []).append(row["image_id"])
    return picks


def fetch_images(corpus: Artifact, image_ids: list[str]) -> dict[str, dict[str, Any]]:
    """Image id -> its corpus row (picture, creator, licence), for the few images that are shown."""
    wanted = broadcast(pa.array(image_ids, pa.string()))

    def task(item: Item) -> pa.Table:
        ids = wanted()
        if not pc.any(pc.is_in(read_table(item["uri"], ["image_id"])["image_id"], value_set=ids)).as_py():
            return _IMAGES.empty_table()
        table = read_table(item["uri"], _IMAGES.names)
        return table.filter(pc.is_in(table["image_id"], value_set=ids)).cast(_IMAGES)

    table = collect(map_parts(part_items(corpus.files("part-", ".parquet")), task), _IMAGES)
    return {row["image_id"]: row for row in table.to_pylist()}


def credits_of(pictures: Sequence[dict[str, Any]]) -> list[str]:
    """``creator (licence)`` of the pictures, each once; pictures with neither are left out."""
    named = {(row["creator"], row["licence"]) for row in pictures if row["creator"] or row["licence"]}
    return sorted(f"{creator or 'unnamed'} ({licence or 'licence not stated'})" for creator, licence in named)


def contact_sheet(images: Sequence[bytes]) -> bytes:
    """A PNG of the pictures side by side, each fitted into a square."""
    sheet = Image.new("RGB", (max(1, len(images)) * (CELL_PX + 4), CELL_PX), "white")
    for place, data in enumerate(images):
        image = decode(data)
        image.thumbnail((CELL_PX, CELL_PX))
        left = place * (CELL_PX + 4) + (CELL_PX - image.width) // 2
        sheet.paste(image, (left, (CELL_PX - image.height) // 2))
    buffer = io.BytesIO()
    sheet.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
