"""The report of the ``labels`` stage: what every step did, what the labels look like, what was dropped.

It shows counts that add up from the corpus to the labels; plots of label frequency, concreteness and interests; the
most and the least concrete terms; contact sheets of labels, of dropped terms and of the senses of polysemous terms.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.config import Config
from lookalike.data.interests.polysemy import separated
from lookalike.data.parts import part_name, read_table
from lookalike.data.report.charts import plot_bars, plot_concreteness, plot_curve, plot_zipf
from lookalike.data.report.sheets import (
    LABEL,
    SENSE,
    TERM,
    Sheet,
    contact_sheet,
    credits_of,
    fetch_images,
    pick_images,
)


class ReportConfig(Config):
    """Size of the report."""

    labels: int = Field(24, ge=0, le=500)
    """Contact sheets of labels, spread evenly over the ranks by frequency."""
    dropped_terms: int = Field(12, ge=0, le=500)
    """Contact sheets of dropped terms, the most frequent first."""
    polysemous_terms: int = Field(12, ge=0, le=500)
    """Terms whose senses are shown, those with the most images told apart first."""
    ranked_terms: int = Field(30, ge=0, le=1000)
    """Terms listed at each end of the ranking by concreteness."""
    images: int = Field(10, ge=1, le=100)
    """Pictures on a sheet."""
    min_images_per_sense: int = Field(2, ge=1)
    """Fewest images on which a sense is alone, for its term to count as told apart."""


def write_report(out: Draft, corpus: Artifact, stats: dict[str, Any], config: ReportConfig) -> dict[str, Any]:
    """Write ``report.html`` and its pictures into the draft; return the number of contact sheets."""
    dictionary, polysemy = read_table(out.path("dictionary.parquet")), read_table(out.path("polysemy.parquet"))
    classes = json.loads(storage.read_bytes(out.path("classes.json")))
    by_rank = sorted(classes, key=lambda c: (-c["images"], c["label"]))
    sections = {
        "labels": label_sheets(by_rank, config.labels),
        "senses": sense_sheets(polysemy, config),
        "dropped": [Sheet(TERM.format(row["term"]), explain_term(row)) for row in dropped_terms(dictionary, config)],
    }
    keys = [sheet.key for sheets in sections.values() for sheet in sheets]
    picks = pick_images(_part_files(out), keys, config.images)
    images = fetch_images(corpus, sorted({image_id for ids in picks.values() for image_id in ids}))
    shown = {
        name: [
            _write_sheet(out, f"{name}-{n}.png", sheet, [images[i]["image"] for i in picks.get(sheet.key, [])])
            for n, sheet in enumerate(sheets)
        ]
        for name, sheets in sections.items()
    }
    _write_plots(out, stats, dictionary, by_rank)
    from jinja2 import Environment

    template = files("lookalike.data.report").joinpath("report.html").read_text()
    most, least = ranked_terms(dictionary, config.ranked_terms)
    values = {"title": out.name, "stats": stats, "flow": flow_of(stats), "credits": credits_of(list(images.values()))}
    page = Environment(autoescape=True).from_string(template)
    html = page.render(sheets=shown, most=most, least=least, **values)
    storage.write_atomic(out.path("report.html"), html.encode())
    return {"sheets": len(keys)}


def _part_files(out: Draft) -> list[dict[str, Any]]:
    numbers = range(len(storage.list_files(out.path("image_labels.parquet"))))
    return [
        {
            "labels": out.path("image_labels.parquet", part_name(number)),
            "text": out.path("annotations.parquet", part_name(number)),
            "assigned": out.work("assigned", part_name(number)),
        }
        for number in numbers
    ]


def label_sheets(by_rank: list[dict[str, Any]], count: int) -> list[Sheet]:
    """Sheets of ``count`` labels, spread evenly over ``by_rank``."""
    spread = [by_rank[i * len(by_rank) // count] for i in range(count)] if by_rank else []
    return [
        Sheet(LABEL.format(label), f"{entry['name']} - {_images(entry['images'])}")
        for label, entry in {entry["label"]: entry for entry in spread}.items()
    ]


def sense_sheets(polysemy: pa.Table, config: ReportConfig) -> list[Sheet]:
    """A sheet for every sense of the terms that were told apart."""
    terms = list(separated(polysemy, config.min_images_per_sense).items())[: config.polysemous_terms]
    alone = {(row["term"], row["interest"]): row["alone"] for row in polysemy.to_pylist()}
    return [
        Sheet(SENSE.format(term, interest), f"{term}, as {interest} - {_images(alone[term, interest])}")
        for term, interests in terms
        for interest in interests
    ]


def dropped_terms(dictionary: pa.Table, config: ReportConfig) -> list[dict[str, Any]]:
    """The most frequent terms that were scored but not kept."""
    rows = dictionary.filter(pc.equal(dictionary["status"], "abstract")).to_pylist()
    return sorted(rows, key=lambda row: (-row["images"], row["term"]))[: config.dropped_terms]


def ranked_terms(dictionary: pa.Table, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The ``count`` most and ``count`` least concrete terms, by lower and by upper bound of their intervals."""
    rows = [row for row in dictionary.to_pylist() if row["concreteness"] is not None]
    most = sorted(rows, key=lambda row: (-row["low"], row["term"]))[:count]
    least = sorted(rows, key=lambda row: (row["high"], row["term"]))[:count]
    return most, least


def explain_term(row: Mapping[str, Any]) -> str:
    """A scored term in words."""
    return (
        f"{row.get('spelling') or row['term']} - held-out accuracy {row['concreteness']:.2f} "
        f"({row['low']:.2f} to {row['high']:.2f}), "
        f"{_images(row['images'])}"
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def flow_of(stats: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(caption, images) from all images of the corpus to those with a label; the numbers add up."""
    splits, dropped = stats["duplicates"]["rows"], stats["duplicates"]["reasons"]
    held_out = [(f"held out for evaluation ({split})", -rows) for split, rows in splits.items() if split != "train"]
    return [
        ("images of the corpus", sum(splits.values())),
        *held_out,
        *((f"dropped: {reason.replace('_', ' ')}", -rows) for reason, rows in dropped.items()),
        ("training images", stats["images"]),
        ("no term of theirs became a label", stats["labelled_images"] - stats["images"]),
        ("training images with a label", stats["labelled_images"]),
    ]


def _write_sheet(out: Draft, name: str, sheet: Sheet, pictures: list[bytes]) -> dict[str, str]:
    storage.write_atomic(out.path(name), contact_sheet(pictures))
    return {"file": name, "caption": sheet.caption}


def _write_plots(out: Draft, stats: dict[str, Any], dictionary: pa.Table, by_rank: list[dict[str, Any]]) -> None:
    scores = [score for score in dictionary["concreteness"].to_pylist() if score is not None]
    boundary = stats["dictionary"]["boundary"]
    plots = {
        "zipf.png": plot_zipf({"labels": [entry["images"] for entry in by_rank]}),
        "concreteness.png": plot_concreteness(scores, boundary),
        "interests.png": plot_bars(stats["interests"], "Training images (an image may have several interests)"),
    }
    if curve := stats["dictionary"].get("curve"):
        plots["boundary.png"] = plot_curve(curve, stats["dictionary"]["criterion"], boundary)
    for name, png in plots.items():
        storage.write_atomic(out.path(name), png)
