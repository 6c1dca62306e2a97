"""The quickstart's tour: a few held-out images as queries to the running service.

It reads artifacts and calls the service as any client does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.seeds import hash_unit
from lookalike.serve.client import Client, Hit

COLUMNS = ["image_id", "image", "title", "group", "view", "category", "dataset", "creator", "licence"]


class TourConfig(Config):
    """The queries of the quickstart's tour."""

    queries: int = Field(6, ge=1, le=100)
    """Number of query images."""
    where: dict[str, list[str]] = {"split": ["test"], "view": ["left"]}
    """Corpus column -> values that a query image may have."""
    k: int = Field(5, ge=1, le=50)
    """Number of neighbours shown."""
    names: dict[str, str] = {}
    """Embeddings step -> its name in tables; by default the step's own."""


@dataclass(frozen=True)
class TourAnswer:
    """A query image, its neighbours by image bytes, and whether its vector gave the same."""

    query: dict[str, Any]
    hits: tuple[Hit, ...]
    same_by_vector: bool
    times_ms: dict[str, float]


def read_rows(corpus: Artifact, condition: pc.Expression) -> list[dict[str, Any]]:
    """Return the corpus rows that meet ``condition``, with image bytes."""
    tables = []
    for uri in corpus.files("part-", ".parquet"):
        filesystem, path = storage.arrow_filesystem(uri)
        tables.append(pq.read_table(path, columns=COLUMNS, filesystem=filesystem, filters=condition))
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def choose_queries(corpus: Artifact, config: TourConfig, seed: int) -> list[dict[str, Any]]:
    """Return the configured number of images, fixed by ``seed``, of different categories if there are enough."""
    condition = pc.scalar(True)
    for column, values in config.where.items():
        condition &= pc.field(column).isin(values)
    rows = sorted(read_rows(corpus, condition), key=lambda row: hash_unit(seed, str(row["image_id"])))
    if not rows:
        raise UsageError(f"demo.where {config.where} selects no image; change it")
    first_of: dict[Any, dict[str, Any]] = {}
    for row in rows:
        first_of.setdefault(row["category"], row)
    distinct = list(first_of.values())
    return (distinct + [row for row in rows if row not in distinct])[: config.queries]


def ask(client: Client, queries: Sequence[dict[str, Any]], k: int) -> list[TourAnswer]:
    """Search by each query's bytes and by its vector and compare the hits; leave out the query's own row."""
    answers = []
    vectors = client.embed([query["image"] for query in queries]).vectors
    for query, vector in zip(queries, vectors, strict=True):
        by_image, by_vector = client.search(image=query["image"], k=k + 1), client.search(vector=vector, k=k + 1)
        hits = tuple(hit for hit in by_image.hits if hit.id != str(query["image_id"]))[:k]
        answers.append(TourAnswer(query, hits, by_image.ids == by_vector.ids, dict(by_image.info.times_ms)))
    return answers


def pictures(corpus: Artifact, answers: Sequence[TourAnswer]) -> dict[str, dict[str, Any]]:
    """Return image_id -> corpus row for every hit in the answers."""
    ids = sorted({hit.id for answer in answers for hit in answer.hits})
    return {row["image_id"]: row for row in read_rows(corpus, pc.field("image_id").isin(ids))}
