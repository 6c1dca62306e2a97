"""Tiny training shards: coloured pictures with labels, published by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.schemas import SHARD
from lookalike.vision.encoder import to_bytes

NUM_CLASSES = {"labels": 5, "category": 3, "group": 4}


def shard_rows(dataset: str, num: int, seed: int, repeat: float = 1.0) -> list[dict[str, Any]]:
    """``num`` rows: the colour follows the group, every third row has no category, every fourth no group."""
    random, rows = np.random.default_rng(seed), []
    for i in range(num):
        group = i % NUM_CLASSES["group"]
        pixels = np.clip(random.normal(40 + 50 * group, 30, (24, 20, 3)), 0, 255).astype(np.uint8)
        rows.append({
            "image_id": f"{dataset}-{i:03d}", "image": to_bytes(Image.fromarray(pixels)), "dataset": dataset,
            "labels": sorted(random.choice(NUM_CLASSES["labels"], int(random.integers(0, 4)), replace=False).tolist()),
            "category": -1 if i % 3 == 2 else i % 3, "group": -1 if i % 4 == 3 else group, "repeat": repeat,
        })  # fmt: skip
    return rows


def write_shard(path: str, rows: list[dict[str, Any]], rows_per_group: int) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD), path, row_group_size=rows_per_group)
    return path


def publish_shards(root: str, num: int = 40) -> Artifact:
    """A ``shards`` artifact of two data sets, four row groups each."""
    draft = Draft(root, "shards", "shards", "5" * 20)
    for i, dataset in enumerate(("catalogue", "clipart")):
        write_shard(storage.join(draft.uri, dataset, "part-00000.parquet"), shard_rows(dataset, num, seed=i), num // 4)
    draft.write_json("classes.json", {name: [str(i) for i in range(n)] for name, n in NUM_CLASSES.items()})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    return publish_shards(str(tmp_path / "root"))
