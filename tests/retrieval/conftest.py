"""One small shard and its data, for the tests of retrieval."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lookalike.retrieval.index_meta import EncoderRef, IndexMeta
from lookalike.retrieval.index_types import ShortlistOptions
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_meta import SHARD_META, ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from tests.synthetic import make_vectors

DIMS = (4, 8, 16, 32)
MakeShard = Callable[..., ShardSearcher]


def make_shard_in(folder, vectors, *, dims=DIMS, kind="flat", dtype="float32", offset=0, columns=None, shortlists=None):  # type: ignore[no-untyped-def]
    """Raw vectors as a shard in an empty ``folder``; ``shortlists`` over all dims by default, more ``columns``."""
    meta = ShardMeta(
        num_rows=len(vectors),
        row_offset=offset,
        dims=dims,
        dtype=dtype,
        shortlist=kind,
        shortlist_dims=shortlists or dims,
    )
    ids = pa.table({"image_id": [f"id-{n:06d}" for n in range(len(vectors))], **(columns or {})})
    half = len(vectors) // 2  # rows in two batches, the later first: the order must not matter
    places = np.arange(len(vectors))
    batches = [(part, vectors[part]) for part in (places[half:], places[:half])]
    meta = write_store(str(folder), meta, ids, batches)
    for dim in meta.shortlist_dims:
        prefix = PrefixStore(str(folder), meta).unit_prefix(dim)
        build_shortlist(kind, prefix, ShortlistOptions()).save(str(folder / shortlist_name(dim, kind)))
    (folder / SHARD_META).write_text(meta.model_dump_json())
    return ShardSearcher.open(str(folder))


@pytest.fixture(scope="session")
def open_shard() -> MakeShard:
    """:func:`make_shard_in`, for shards that several tests share."""
    return make_shard_in


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """:func:`make_shard_in` a folder of its own ``name``."""

    def make(vectors, *, name="shard", **settings):  # type: ignore[no-untyped-def]
        (tmp_path / name).mkdir()
        return make_shard_in(tmp_path / name, vectors, **settings)

    return make


@pytest.fixture
def vectors() -> np.ndarray:
    """300 raw vectors of 32-d with falling variance and lengths from 0.1 to 30."""
    generator = np.random.default_rng(5)
    spread = np.arange(1, 33) ** -0.5
    scale = generator.uniform(0.1, 30, (300, 1))
    return (generator.standard_normal((300, 32)) * spread * scale).astype(np.float32)


@pytest.fixture
def queries() -> np.ndarray:
    """20 raw queries."""
    generator = np.random.default_rng(6)
    return (generator.standard_normal((20, 32)) * np.arange(1, 33) ** -0.5 * 7).astype(np.float32)


def index_of_shards(*shards, columns=("image_id",)):  # type: ignore[no-untyped-def]
    """All ``shards`` as one index."""
    rows, first = tuple(shard.meta.num_rows for shard in shards), shards[0].meta
    meta = IndexMeta(
        dims=first.dims,
        num_rows=sum(rows),
        shards=tuple(f"shard-{number}" for number in range(len(shards))),
        shard_rows=rows,
        dtype=first.dtype,
        shortlist=first.shortlist,
        shortlist_dims=first.shortlist_dims,
        columns=columns,
        encoder=EncoderRef(fingerprint="m"),
    )
    return Searcher(meta, shards)


@pytest.fixture(scope="session")
def index_of() -> Callable[..., Searcher]:
    """:func:`index_of_shards`."""
    return index_of_shards


@pytest.fixture(scope="session")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """3,000 vectors of 32-d in two shards with HNSW over every dim."""
    data, _ = make_vectors(3000, 32, num_classes=100, seed=4)
    folder = tmp_path_factory.mktemp
    return index_of_shards(
        *(make_shard_in(folder("shard"), data[a:b], kind="hnsw", offset=a) for a, b in ((0, 1600), (1600, 3000)))
    )


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """One shard of 2,000 vectors with int8 graphs over 8-d and the full 32-d."""
    data, _ = make_vectors(2000, 32, num_classes=60, seed=9)
    return index_of_shards(make_shard_in(tmp_path_factory.mktemp("graph"), data, kind="graph", shortlists=(8, 32)))
