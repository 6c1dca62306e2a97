"""What the quickstart shows: a few held-out images sent to the running service, and everything the report gathers.

Reads artifacts and talks to the service as any client would; it knows nothing of how stages work.
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
from lookalike.serve.client import Client, Hit, SearchResult

SHOWN = ["image_id", "image", "title", "group", "view", "category", "dataset", "creator", "licence"]


class TourConfig(Config):
    """Which images the quickstart asks the service about."""

    queries: int = Field(6, ge=1, le=100)
    """How many."""
    where: dict[str, list[str]] = {"split": ["test"], "view": ["left"]}
    """Columns of the corpus and the values that a query image may have."""
    k: int = Field(5, ge=1, le=50)
    """Neighbours shown."""
    names: dict[str, str] = {}
    """Embeddings step -> what tables call it; a step that is not here keeps its own name."""


@dataclass(frozen=True)
class TourAnswer:
    """A query image, its neighbours by image bytes, and whether the query by vector gave the same."""

    query: dict[str, Any]
    hits: tuple[Hit, ...]
    same_by_vector: bool
    times_ms: dict[str, float]


def read_rows(corpus: Artifact, condition: pc.Expression) -> list[dict[str, Any]]:
    """Corpus rows that meet ``condition``, with image bytes."""
    tables = []
    for uri in corpus.files("part-", ".parquet"):
        filesystem, path = storage.arrow_filesystem(uri)
        tables.append(pq.read_table(path, columns=SHOWN, filesystem=filesystem, filters=condition))
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def choose_queries(corpus: Artifact, config: TourConfig, seed: int) -> list[dict[str, Any]]:
    """The configured number of images, the same ones for a seed, each of another category where there are enough."""
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
    """Send each query's bytes, then its vector, and compare; the query's own row is left out of what is shown."""
    answers = []
    vectors = client.embed([query["image"] for query in queries]).vectors
    for query, vector in zip(queries, vectors, strict=True):
        by_image = client.search(image=query["image"], k=k + 1)
        by_vector = client.search(vector=vector, k=k + 1)
        answers.append(
            TourAnswer(
                query=query,
                hits=_without(by_image, str(query["image_id"]))[:k],
                same_by_vector=[hit.id for hit in by_image.hits] == [hit.id for hit in by_vector.hits],
                times_ms=dict(by_image.info.times_ms),
            )
        )
    return answers


def _without(result: SearchResult, image_id: str) -> tuple[Hit, ...]:
    return tuple(hit for hit in result.hits if hit.id != image_id)


def pictures(corpus: Artifact, answers: Sequence[TourAnswer]) -> dict[str, dict[str, Any]]:
    """image_id -> corpus row of every image that the answers show."""
    wanted = sorted({hit.id for answer in answers for hit in answer.hits})
    return {row["image_id"]: row for row in read_rows(corpus, pc.field("image_id").isin(wanted))}
