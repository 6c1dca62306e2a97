"""Precision of the annotator's terms, as judged by eye.

python -m tests.benchmarks.label_precision --labels LABELS_URI
    precision with its Wilson interval, from tests/data/term_verdicts.csv (image_id, term, verdict: right, wrong or
    unsure); verdicts count if LABELS_URI still has their annotation, and the row says how many do
python -m tests.benchmarks.label_precision --draw LABELS_URI CORPUS_URI --out DIR
    the sample to judge: 200 annotations of training images, drawn uniformly by hash, as sample.csv (verdict left empty)
    and as contact sheets of 50 pictures, each with its number in the file, image id and term
"""

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image, ImageDraw

from lookalike.artifacts import Artifact
from lookalike.data.parts import read_table
from lookalike.intervals import wilson
from lookalike.sampling import mix_keys, stable_keys
from lookalike.vision.images import decode

VERDICTS = Path(__file__).parents[1] / "data" / "term_verdicts.csv"
ALLOWED = ("right", "wrong", "unsure")
SEED, COUNT, PER_SHEET, ACROSS, CELL_PX, CAPTION_PX = 23, 200, 50, 10, 150, 44
FIELDS = ("title", "keywords", "category", "description")


def annotations_of(labels: Artifact) -> Iterator[pl.DataFrame]:
    """image_id, term, score of the training rows, one table per part."""
    for uri in labels.files("annotations.parquet/part-", ".parquet"):
        frame = pl.DataFrame(pl.from_arrow(read_table(uri)))
        yield frame.filter(pl.col("split") == "train").select("image_id", "term", "score")


def draw(parts: Iterator[pl.DataFrame], ids: set[str] | None, count: int, seed: int) -> pl.DataFrame:
    """The ``count`` annotations with the smallest hashes of images in ``ids`` (None: of all), sorted by hash."""
    sample = pl.DataFrame(schema={"image_id": pl.String, "term": pl.String, "score": pl.Float32, "hash": pl.UInt64})
    for frame in parts:
        wanted = frame if ids is None else frame.filter(pl.col("image_id").is_in(list(ids)))
        names = [f"{row['image_id']}\x00{row['term']}" for row in wanted.to_dicts()]
        hashes = pl.Series("hash", mix_keys(stable_keys(names), seed, "verdict"), dtype=pl.UInt64)
        sample = pl.concat([sample, wanted.with_columns(hashes)]).sort("hash", "image_id", "term").head(count)
    return sample


def precision(verdicts: Sequence[dict[str, str]], existing: set[tuple[str, str]]) -> dict[str, Any]:
    """Share of right terms among the verdicts that are sure and whose annotation still exists; a verdict outside
    ``ALLOWED`` raises ``ValueError``."""
    unknown = sorted({row["verdict"] for row in verdicts} - set(ALLOWED))
    if unknown:
        raise ValueError(f"verdicts {unknown} are none of {', '.join(ALLOWED)}")
    valid = [row for row in verdicts if (row["image_id"], row["term"]) in existing]
    counts = Counter(row["verdict"] for row in valid)
    sure = counts["right"] + counts["wrong"]
    low, high = wilson(counts["right"], sure)
    return {
        "bench": "label_precision",
        "verdicts": len(verdicts),
        "still_apply": len(valid),
        **{verdict: counts[verdict] for verdict in ALLOWED},
        "precision": counts["right"] / sure if sure else None,
        "low": round(low, 4),
        "high": round(high, 4),
    }


def records_of(corpus: Artifact, dataset: str) -> tuple[set[str], Iterator[dict[str, Any]]]:
    """Ids of a data set, and its rows with picture and text."""
    ids: set[str] = set()
    for uri in corpus.files("part-", ".parquet"):
        table = read_table(uri, ["image_id", "dataset"])
        ids.update(row["image_id"] for row in table.to_pylist() if row["dataset"] == dataset)

    def rows() -> Iterator[dict[str, Any]]:
        for uri in corpus.files("part-", ".parquet"):
            yield from read_table(uri, ["image_id", "image", *FIELDS]).to_pylist()

    return ids, rows()


def contact_sheet(cells: Sequence[tuple[str, bytes]]) -> bytes:
    """PNG of pictures with captions, ``ACROSS`` per row."""
    down = -(-len(cells) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (CELL_PX + 6), down * (CELL_PX + CAPTION_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (caption, data) in enumerate(cells):
        image = decode(data)
        image.thumbnail((CELL_PX, CELL_PX))
        left, top = place % ACROSS * (CELL_PX + 6), place // ACROSS * (CELL_PX + CAPTION_PX)
        sheet.paste(image, (left + (CELL_PX - image.width) // 2, top + (CELL_PX - image.height) // 2))
        pen.multiline_text((left + 2, top + CELL_PX + 2), caption, fill="black", spacing=1)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_sample(labels: Artifact, corpus: Artifact, dataset: str, out: Path) -> None:
    """``sample.csv`` and ``sheet-*.png``."""
    ids, rows = records_of(corpus, dataset)
    sample = draw(annotations_of(labels), ids, COUNT, SEED).to_dicts()
    wanted = {row["image_id"] for row in sample}
    records = {row["image_id"]: row for row in rows if row["image_id"] in wanted}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sample.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "term", "verdict", "number", "score", "text"])
        for number, row in enumerate(sample):
            text = " | ".join(str(records[row["image_id"]][field] or "") for field in FIELDS)
            writer.writerow([row["image_id"], row["term"], "", number, round(row["score"], 3), text])
    for start in range(0, len(sample), PER_SHEET):
        cells = [
            (
                f"{number} {row['term']}\n{row['image_id'][-44:-22]}\n{row['image_id'][-22:]}",
                records[row["image_id"]]["image"],
            )
            for number, row in enumerate(sample[start : start + PER_SHEET], start)
        ]
        (out / f"sheet-{start // PER_SHEET}.png").write_bytes(contact_sheet(cells))


def main() -> None:
    """Draw a sample, or print the precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", help="labels artifact that the verdicts judge")
    parser.add_argument("--draw", nargs=2, metavar=("LABELS_URI", "CORPUS_URI"))
    parser.add_argument("--dataset", default="openclipart")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--verdicts", type=Path, default=VERDICTS)
    options = parser.parse_args()
    if options.draw:
        write_sample(Artifact.open(options.draw[0]), Artifact.open(options.draw[1]), options.dataset, options.out)
        return
    if not options.labels:
        parser.error("give --labels LABELS_URI or --draw LABELS_URI CORPUS_URI")
    with options.verdicts.open(encoding="utf-8", newline="") as file:
        verdicts = list(csv.DictReader(file))
    judged = {(row["image_id"], row["term"]) for row in verdicts}
    existing = {
        pair
        for frame in annotations_of(Artifact.open(options.labels))
        for pair in frame.select("image_id", "term").iter_rows()
        if pair in judged
    }
    print(json.dumps(precision(verdicts, existing)))


if __name__ == "__main__":
    main()
