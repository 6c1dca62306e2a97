"""Step 7, the report of the ``labels`` stage: what the labels look like, and what was thrown away.

Plots of label frequency and concreteness, the label counts after each step, and contact sheets of labels and of
dropped terms, with pictures chosen by hash so that the page does not flatter.
"""

import io
import json
from collections.abc import Sequence
from functools import reduce
from importlib.resources import files
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.config import Config
from lookalike.data.parts import Item, blocks_of, broadcast, collect, map_parts, part_items, read_table
from lookalike.sampling import stable_keys
from lookalike.vision.images import decode

CELL_PX = 96
_IMAGES = pa.schema([("image_id", pa.string()), ("image", pa.binary()), ("creator", pa.string()),
                     ("licence", pa.string())])  # fmt: skip
_PICKS = pa.schema([("key", pa.string()), ("hash", pa.uint64()), ("image_id", pa.string())])


class ReportConfig(Config):
    """Size of the report."""

    labels: int = Field(24, ge=0, le=500)
    """Contact sheets of labels, spread evenly over their ranks by frequency."""
    dropped_terms: int = Field(12, ge=0, le=500)
    """Contact sheets of dropped terms, the most frequent ones."""
    images: int = Field(10, ge=1, le=100)
    """Pictures on a sheet."""


def write_report(
    out: Draft, corpus: Artifact, stats: dict[str, Any], config: ReportConfig, boundary: float
) -> dict[str, Any]:
    """Write ``report.html`` and its pictures into the draft; returns how many sheets it has."""
    classes = json.loads(storage.read_bytes(out.path("classes.json")))
    dictionary = read_table(out.path("dictionary.parquet"))
    by_rank = sorted(classes, key=lambda c: (-c["images"], c["label"]))
    shown = [by_rank[i * len(by_rank) // config.labels] for i in range(config.labels)] if by_rank else []
    shown = list({entry["label"]: entry for entry in shown}.values())
    terms = dropped_terms(dictionary, config.dropped_terms)
    picks = _pick(out, [entry["label"] for entry in shown], [row["term"] for row in terms], config.images)
    images = _fetch(corpus, sorted({image_id for chosen in picks.values() for image_id in chosen}))
    plot_zipf(out, [entry["images"] for entry in by_rank])
    plot_concreteness(out, dictionary, boundary)
    pictures = {key: [images[image_id]["image"] for image_id in chosen] for key, chosen in picks.items()}
    labels = [_sheet(out, f"label-{e['label']}.png", f"{e['name']} - {e['images']} images",
                     pictures.get(f"label/{e['label']}", [])) for e in shown]  # fmt: skip
    dropped = [_sheet(out, f"dropped-{n}.png", _explain(row), pictures.get(f"term/{row['term']}", []))
               for n, row in enumerate(terms)]  # fmt: skip
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(files("lookalike.data").joinpath("report.html").read_text())
    html = template.render(title=out.name, stats=stats, sheets=labels, dropped=dropped,
                           credits=credits_of(list(images.values())))  # fmt: skip
    storage.write_atomic(out.path("report.html"), html.encode())
    return {"sheets": len(labels) + len(dropped)}


def dropped_terms(dictionary: pa.Table, count: int) -> list[dict[str, Any]]:
    """The ``count`` most frequent terms that were scored and not kept."""
    rows = dictionary.filter(pc.equal(dictionary["status"], "abstract")).to_pylist()
    return sorted(rows, key=lambda row: (-row["images"], row["term"]))[:count]


def _explain(row: dict[str, Any]) -> str:
    return (f"{row['term']} - held-out accuracy {row['concreteness']:.2f} ({row['low']:.2f} to {row['high']:.2f}), "
            f"{row['images']} images")  # fmt: skip


def pick_part(
    labels: pa.Table, annotations: pa.Table, *, columns: Sequence[int], terms: Sequence[str], count: int
) -> pa.Table:
    """``_PICKS`` of a part: for each label and each term its ``count`` images of smallest hash. Parts merge."""
    of_labels = pl.DataFrame(pl.from_arrow(labels.select(["image_id", "labels"]))).explode("labels").filter(
        pl.col("labels").is_in(list(columns))
    ).select(key=pl.format("label/{}", "labels"), image_id="image_id")  # fmt: skip
    of_terms = pl.DataFrame(pl.from_arrow(annotations.select(["image_id", "term", "split"]))).filter(
        pl.col("term").is_in(list(terms)) & (pl.col("split") == "train")
    ).select(key=pl.format("term/{}", "term"), image_id="image_id")  # fmt: skip
    both = pl.concat([of_labels, of_terms])
    hashes = pl.Series("hash", stable_keys(both["image_id"].to_list()), dtype=pl.UInt64)
    return smallest(both.with_columns(hashes).select(_PICKS.names), count)


def smallest(frame: pl.DataFrame, count: int) -> pa.Table:
    """The ``count`` rows of smallest hash of each key."""
    ranked = frame.sort("key", "hash", "image_id").filter(pl.int_range(pl.len()).over("key") < count)
    return ranked.to_arrow().cast(_PICKS)


def _pick(out: Draft, columns: list[int], terms: list[str], count: int) -> dict[str, list[str]]:
    names = storage.list_files(out.path("image_labels.parquet"))

    def task(item: Item) -> pa.Table:
        labels = read_table(storage.join(item["uri"], "image_labels.parquet", item["name"]))
        annotations = read_table(storage.join(item["uri"], "annotations.parquet", item["name"]))
        return pick_part(labels, annotations, columns=columns, terms=terms, count=count)

    blocks = blocks_of(map_parts([{"uri": out.uri, "name": name} for name in names], task))
    merged = reduce(lambda a, b: smallest(pl.DataFrame(pl.from_arrow(pa.concat_tables([a, b]))), count), blocks,
                    _PICKS.empty_table())  # fmt: skip
    chosen: dict[str, list[str]] = {}
    for row in merged.to_pylist():
        chosen.setdefault(row["key"], []).append(row["image_id"])
    return chosen


def _fetch(corpus: Artifact, image_ids: list[str]) -> dict[str, dict[str, Any]]:
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
    """``creator (licence)`` of the pictures, each once; rows that name neither are left out."""
    named = {(row["creator"], row["licence"]) for row in pictures if row["creator"] or row["licence"]}
    return sorted(f"{creator or 'unnamed'} ({licence or 'licence not stated'})" for creator, licence in named)


def _sheet(out: Draft, name: str, caption: str, pictures: list[bytes]) -> dict[str, str]:
    storage.write_atomic(out.path(name), contact_sheet(pictures))
    return {"file": name, "caption": caption}


def contact_sheet(images: Sequence[bytes]) -> bytes:
    """PNG of the pictures side by side, each fitted into a square."""
    sheet = Image.new("RGB", (max(1, len(images)) * (CELL_PX + 4), CELL_PX), "white")
    for place, data in enumerate(images):
        image = decode(data)
        image.thumbnail((CELL_PX, CELL_PX))
        left = place * (CELL_PX + 4) + (CELL_PX - image.width) // 2
        sheet.paste(image, (left, (CELL_PX - image.height) // 2))
    buffer = io.BytesIO()
    sheet.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plot_zipf(out: Draft, images: list[int]) -> None:
    """``zipf.png``: images of a label against its rank, both on log scales."""
    figure, axes = _axes("Rank of the label", "Training images")
    axes.loglog(range(1, len(images) + 1), images, marker=".", linewidth=1)
    _save(figure, out, "zipf.png")


def plot_concreteness(out: Draft, dictionary: pa.Table, boundary: float) -> None:
    """``concreteness.png``: histogram of the scored terms and the decision boundary."""
    scores = [score for score in dictionary["concreteness"].to_pylist() if score is not None]
    figure, axes = _axes("Held-out accuracy of the term's classifier", "Terms")
    axes.hist(scores, bins=40, range=(0.0, 1.0), color="#7a9cc6")
    axes.axvline(boundary, color="#b03030", linewidth=1.5, label=f"boundary {boundary:g}")
    axes.legend(frameon=False)
    _save(figure, out, "concreteness.png")


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, out: Draft, name: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    storage.write_atomic(out.path(name), buffer.getvalue())
