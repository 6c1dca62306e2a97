"""A small made-up corpus: coloured shapes whose words are partly about what is seen and partly not."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.schemas import CORPUS, embeddings

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}


def draw(shape: str, colour: str, rng: np.random.Generator) -> bytes:
    """A PNG of a coloured shape on a noisy ground."""
    image = Image.fromarray(rng.integers(150, 255, (48, 48, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    x, y, r = (int(v) for v in (rng.integers(16, 32), rng.integers(16, 32), rng.integers(8, 15)))
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` records; "magick" is a keyword at random, two of each hundred are copies, some are held out."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        shape, colour = SHAPES[int(rng.integers(3))], list(COLOURS)[int(rng.integers(3))]
        keywords = [shape.title() + "s", colour] + (["magick"] if rng.random() < 0.5 else [])
        row = dict.fromkeys(CORPUS.names)
        row |= {
            "image_id": f"id-{number:04d}",
            "image": draw(shape, colour, rng),
            "title": f"A {colour} {shape}",
            "keywords": keywords,
            "category": f"shapes/{shape}",
            "locale": "en",
            "dataset": "shapes",
            "split": "test" if number % 11 == 10 else "train",
            "width": 48,
            "height": 48,
        }
        if number % 50 == 49:
            row["image"] = rows[number - 20]["image"]
            row["title"], row["keywords"] = "copy", ["zebra crossing"]
        rows.append(row)
    return rows


def publish_corpus(root: str, rows: list[dict[str, Any]], parts: int) -> Artifact:
    """A corpus artifact with the rows cut into ``parts`` files."""
    draft = Draft(root, "corpus", "shapes", f"{parts:020d}")
    storage.make_directory(draft.uri)
    table = pa.Table.from_pylist(rows, schema=CORPUS)
    size = -(-len(rows) // parts)
    for number in range(parts):
        pq.write_table(table.slice(number * size, size), draft.path(f"part-{number:06d}.parquet"))
    draft.stats["datasets"] = {"shapes": dict(Counter(row["split"] for row in rows))}
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0)


def publish_embeddings(root: str, rows: list[dict[str, Any]], parts: int) -> Artifact:
    """Vectors that show shape and colour and nothing else, with noise; equal pictures get equal vectors."""
    draft = Draft(root, "embeddings", "shapes", f"{parts:020d}")
    storage.make_directory(draft.uri)
    seen: dict[bytes, np.ndarray[Any, Any]] = {}
    rng = np.random.default_rng(5)
    for row in rows:
        code = np.zeros(16, np.float32)
        words = row["title"].split()
        if len(words) == 3:
            code[SHAPES.index(words[2])] = code[3 + list(COLOURS).index(words[1])] = 2.0
        seen.setdefault(row["image"], code + rng.normal(0, 0.4, 16).astype(np.float32))
    vectors = np.stack([seen[row["image"]] for row in rows])
    size = -(-len(rows) // parts)
    for number in range(parts):
        chosen = slice(number * size, (number + 1) * size)
        columns: dict[str, Any] = {
            name: [row[name] for row in rows[chosen]] for name in embeddings(16).names if name != "vector"
        }
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors[chosen].reshape(-1)), 16)
        table = pa.table({name: columns[name] for name in embeddings(16).names}, schema=embeddings(16))
        pq.write_table(table, draft.path(f"part-{number:06d}.parquet"))
    draft.write_json("meta.json", {"dim": 16, "dims": [16], "encoder": {}, "rows": len(rows)})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Where a test publishes."""
    return str(tmp_path / "root")
