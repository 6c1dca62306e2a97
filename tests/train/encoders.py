"""Tiny encoders, corpora and reports for tests, published by hand."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.schemas import CORPUS
from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder


def publish_encoder(
    root: str, name: str = "tiny", *, parents: dict[str, list[Artifact]] | None = None, **values: Any
) -> Artifact:
    """A random encoder of 16 nested dims on ``test_efficientnet``, as training would publish it."""
    settings = {
        "backbone": "test_efficientnet",
        "num_features": 256,
        "dims": (4, 16),
        "projection": True,
        "transform": {"size": 32},
        **values,
    }
    config = EncoderConfig.model_validate(settings)
    torch.manual_seed(0)
    draft = Draft(root, "encoder", name, "e" * 20)
    draft.stats.update(dim=config.dim)
    save_encoder(draft, build_model(config), config, f"# {name}\n\nTrained on nothing at all.\n")
    return draft.publish(config={"seed": 1}, parents=parents or {}, stage_version=1, duration_s=0.5)


def draw(number: int) -> bytes:
    """A JPEG of smooth colours that differs by number."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (5, 4 + number % 3, 3), np.uint8)).resize((60, 48))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def publish_corpus(root: str, files: int = 3, groups: int = 2, rows: int = 5) -> Artifact:
    """A corpus of ``files`` files of ``groups`` row groups of ``rows`` images each; ``view`` alternates."""
    draft = Draft(root, "corpus", "corpus", "c" * 20)
    size = groups * rows
    for file in range(files):
        numbers = range(file * size, (file + 1) * size)
        records = [
            {
                "image_id": f"id-{n:04d}",
                "image": draw(n),
                "title": f"picture {n}",
                "dataset": "d",
                "view": ("icon", "left")[n % 2],
                "split": "train",
                "group": str(n % 4),
            }
            for n in numbers
        ]
        uri = draft.path(f"part-{file:06d}-0000.parquet")
        Path(storage.local_path(uri)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records, schema=CORPUS), uri, row_group_size=rows)
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def publish_report(root: str, encoder: Artifact, name: str = "vectors") -> Artifact:
    """An evaluation of ``encoder``'s vectors, and of another's, with two tasks."""
    embeddings = []
    for title, fingerprint in ((name, encoder.manifest.fingerprint), ("other", "o" * 20)):
        draft = Draft(root, "embeddings", title, fingerprint)
        draft.write_json("meta.json", {"dim": 16, "dims": [4, 16], "encoder": {"fingerprint": fingerprint}})
        embeddings.append(draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0))
    rows = [
        {
            "embedding": title,
            "method": method,
            "task": task,
            "dim": dim,
            "queries": 7,
            "database": 90,
            "p_at_1": 0.5 + dim / 100 + 0.2 * (title == "other"),
            "p_at_1_standard_error": 0.01,
            "map_at_10_by_k": 0.25,
        }
        for title in (name, "other")
        for method in ("prefix", "svd")
        for task in ("product", "category")
        for dim in (16, 4)
    ]
    draft = Draft(root, "report", "evaluate", "r" * 20)
    draft.write_json("report.json", {"rows": rows})
    return draft.publish(config={}, parents={"embeddings": embeddings}, stage_version=1, duration_s=0.0)
