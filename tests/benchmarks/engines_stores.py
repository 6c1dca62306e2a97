"""Engines of the retrieval comparison that are embedded databases: qdrant-edge, zvec, LanceDB, Milvus, Chroma.

They are built and opened like those of ``engines.py``. Ids are row numbers; answers are only ids.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from lookalike.retrieval.ranking import Floats, Rows
from tests.benchmarks.engines import EF_CONSTRUCTION, EFS, Engine, M, Search, prefixes, row_numbers

WRITTEN = 1000
"""Rows written at a time."""


def _cuts(num_rows: int) -> Iterator[range]:
    for start in range(0, num_rows, WRITTEN):
        yield range(start, min(num_rows, start + WRITTEN))


def build_qdrant(vectors: Floats, folder: str, staged: bool) -> None:
    """One segment: a graph over the full vectors, or graphs over prefixes beside the full vectors without a graph."""
    import qdrant_edge as qdrant

    dim = vectors.shape[1]
    graph = qdrant.HnswIndexConfig(M, EF_CONSTRUCTION, 1, max_indexing_threads=1)
    none = qdrant.HnswIndexConfig(0, EF_CONSTRUCTION, 1)
    dot, cosine = qdrant.Distance.Dot, qdrant.Distance.Cosine
    named = {"full": qdrant.EdgeVectorParams(dim, dot, hnsw_config=none if staged else graph)}
    sizes = prefixes(dim) if staged else ()
    named |= {f"p{size}": qdrant.EdgeVectorParams(size, cosine, hnsw_config=graph) for size in sizes}
    merged = qdrant.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=1, max_segment_size=1 << 30)
    shard = qdrant.EdgeShard.create(
        folder, qdrant.EdgeConfig(named, hnsw_config=graph, optimizers=merged, max_search_threads=1, wal_enabled=False)
    )
    for cut in _cuts(len(vectors)):
        values = {name: vectors[cut.start : cut.stop, : params.size].tolist() for name, params in named.items()}
        points = [qdrant.Point(row, {name: values[name][place] for name in named}) for place, row in enumerate(cut)]
        shard.update(qdrant.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.optimize()
    shard.close()


def open_qdrant(folder: str, dim: int) -> Callable[..., Search]:
    """A graph's answer, or with ``p`` and ``K`` a prefetch of K rows at that prefix that the full vectors re-rank."""
    import qdrant_edge as qdrant

    shard = qdrant.EdgeShard.load(folder)

    def prepare(k: int, ef: int, p: int = 0, K: int = 0) -> Search:
        effort = qdrant.SearchParams(hnsw_ef=ef)

        def request(query: list[float]) -> Any:
            nearest = qdrant.Query.Nearest(query, using="full")
            if not p:
                return qdrant.QueryRequest(k, query=nearest, params=effort)
            first = qdrant.Prefetch(K, qdrant.Query.Nearest(query[:p], using=f"p{p}"), params=effort)
            return qdrant.QueryRequest(k, query=nearest, prefetches=[first])

        def search(queries: Floats) -> Rows:
            requests = [request(query) for query in queries.tolist()]
            found = (
                shard.query_batch(qdrant.QueryBatchRequest(requests))
                if len(requests) > 1
                else [shard.query(requests[0])]
            )
            return row_numbers([[hit.id for hit in hits] for hits in found], k)

        return search

    return prepare


def _zvec_init() -> Any:
    import zvec

    zvec.init(query_threads=1, optimize_threads=1, log_level=zvec.LogLevel.ERROR)
    return zvec


def build_zvec(vectors: Floats, folder: str, number: str) -> None:
    """A graph over the full vectors, unchanged or in the 8 or 16 bits that ``number`` names."""
    zvec = _zvec_init()
    quantised = {"quantize_type": getattr(zvec.QuantizeType, number)} if number else {}
    graph = zvec.HnswIndexParam(zvec.MetricType.IP, M, EF_CONSTRUCTION, use_contiguous_memory=True, **quantised)
    field = zvec.VectorSchema("full", zvec.DataType.VECTOR_FP32, vectors.shape[1], graph)
    store = zvec.create_and_open(f"{folder}/store", zvec.CollectionSchema("rows", vectors=[field]))
    for cut in _cuts(len(vectors)):
        store.insert([zvec.Doc(id=str(row), vectors={"full": vectors[row].tolist()}) for row in cut])
    store.flush()
    store.optimize(zvec.OptimizeOption(concurrency=1))
    store.close()


def open_zvec(folder: str, dim: int) -> Callable[..., Search]:
    """Read-only, by its fast path for ids; ``refine``: the full numbers re-rank."""
    zvec = _zvec_init()
    store = zvec.open(f"{folder}/store", zvec.CollectionOption(read_only=True))

    def prepare(k: int, ef: int, refine: int = 0) -> Search:
        effort = zvec.HnswQueryParam(ef=ef, is_using_refiner=bool(refine), scale_factor=float(refine))

        def search(queries: Floats) -> Rows:
            found = [
                store.query_internal_ids(zvec.Query("full", vector=query, param=effort), topk=k) for query in queries
            ]
            return row_numbers([store.resolve_internal_ids(ids) for ids in found], k)

        return search

    return prepare


def build_lance(vectors: Floats, folder: str, kind: str) -> None:
    """One partition with a graph over 8-bit numbers, or lists of RaBitQ codes."""
    import lancedb
    import pyarrow as pa
    from lancedb.index import HnswSq, IvfRq

    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = lancedb.connect(folder).create_table("rows", pa.table({"id": np.arange(len(vectors)), "vector": flat}))
    graph = HnswSq("dot", num_partitions=1, m=M, ef_construction=EF_CONSTRUCTION)
    lists = IvfRq("dot", num_partitions=round(2 * len(vectors) ** 0.5))
    table.create_index("vector", config=graph if kind == "graph" else lists)


def open_lance(folder: str, dim: int) -> Callable[..., Search]:
    """The stored vectors re-rank ``refine`` times k rows."""
    import lancedb

    table = lancedb.connect(folder).open_table("rows")

    def prepare(k: int, refine: int, ef: int = 0, nprobe: int = 1) -> Search:
        def search(queries: Floats) -> Rows:
            single = len(queries) == 1
            asked = table.search(queries[0] if single else queries)
            asked = asked.nprobes(nprobe).refine_factor(refine).limit(k).select(["id", "_distance"])
            found = (asked.ef(ef) if ef else asked).to_arrow()
            if single:
                return row_numbers([found["id"].to_pylist()], k)
            bounds = np.searchsorted(found["query_index"].to_numpy(), np.arange(1, len(queries)))
            return row_numbers(np.split(found["id"].to_numpy(), bounds), k)

        return search

    return prepare


def build_milvus(vectors: Floats, folder: str, kind: str) -> None:
    """A graph over full or 8-bit vectors; Milvus Lite builds it with faiss."""
    from milvus_lite import CollectionSchema, DataType, FieldSchema, MilvusLite

    fields = [
        FieldSchema("id", DataType.INT64, is_primary=True),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1]),
    ]
    store = MilvusLite(folder)
    rows = store.create_collection("rows", CollectionSchema(fields))
    for cut in _cuts(len(vectors)):
        rows.insert([{"id": row, "vector": vectors[row].tolist()} for row in cut])
    rows.flush()
    graph = {"index_type": kind, "metric_type": "IP", "params": {"M": M, "efConstruction": EF_CONSTRUCTION}}
    rows.create_index("vector", graph)
    rows.load()
    store.close()


def open_milvus(folder: str, dim: int) -> Callable[..., Search]:
    """Its Python engine, without the server in front."""
    from milvus_lite import MilvusLite

    rows = MilvusLite(folder).get_collection("rows")
    rows.load()

    def prepare(k: int, ef: int) -> Search:
        def search(queries: Floats) -> Rows:
            found = rows.search(queries.tolist(), k, "IP", output_fields=[], search_params={"ef": ef})
            return row_numbers([[hit["id"] for hit in hits] for hits in found], k)

        return search

    return prepare


def _chroma(folder: str) -> Any:
    import chromadb
    from chromadb.api.shared_system_client import SharedSystemClient

    SharedSystemClient.clear_system_cache()  # a collection that is open keeps its old settings
    return chromadb.PersistentClient(folder, settings=chromadb.Settings(anonymized_telemetry=False))


def build_chroma(vectors: Floats, folder: str) -> None:
    """A graph over the full vectors."""
    graph = {"space": "ip", "max_neighbors": M, "ef_construction": EF_CONSTRUCTION, "num_threads": 1}
    store = _chroma(folder).create_collection("rows", configuration={"hnsw": graph}, embedding_function=None)
    for cut in _cuts(len(vectors)):
        store.add(ids=[str(row) for row in cut], embeddings=vectors[cut.start : cut.stop])


def open_chroma(folder: str, dim: int) -> Callable[..., Search]:
    """The collection, opened by a new client."""

    def prepare(k: int, ef: int) -> Search:
        _chroma(folder).get_collection("rows").modify(configuration={"hnsw": {"ef_search": ef}})
        store = _chroma(folder).get_collection("rows", embedding_function=None)
        return lambda queries: row_numbers(store.query(query_embeddings=queries, n_results=k, include=[])["ids"], k)

    return prepare


PREFETCH = tuple(
    {"p": p, "K": size, "ef": size} for p, size in ((64, 40), (64, 100), (64, 200), (128, 30), (128, 50), (128, 100))
)
STORES = {
    "qdrant-edge": Engine("qdrant_edge", partial(build_qdrant, staged=False), open_qdrant, EFS),
    "qdrant-edge-prefetch": Engine("qdrant_edge", partial(build_qdrant, staged=True), open_qdrant, PREFETCH),
    "zvec": Engine("zvec", partial(build_zvec, number=""), open_zvec, EFS, batch=False),
    "zvec-int8": Engine(
        "zvec",
        partial(build_zvec, number="INT8"),
        open_zvec,
        tuple({"ef": ef, "refine": refine} for ef, refine in ((16, 0), (32, 0), (64, 0), (32, 3), (64, 5), (128, 5))),
        batch=False,
    ),
    "lancedb-hnsw-sq": Engine(
        "lancedb",
        partial(build_lance, kind="graph"),
        open_lance,
        tuple({"ef": ef, "refine": refine} for ef, refine in ((32, 1), (32, 3), (64, 3), (128, 5))),
    ),
    "lancedb-ivf-rq": Engine(
        "lancedb",
        partial(build_lance, kind="lists"),
        open_lance,
        tuple({"nprobe": nprobe, "refine": refine} for nprobe, refine in ((16, 5), (32, 10), (64, 10))),
    ),
    **{
        name: Engine("milvus_lite.index.faiss_hnsw", partial(build_milvus, kind=kind), open_milvus, EFS)
        for name, kind in (("milvus-lite", "HNSW"), ("milvus-lite-sq", "HNSW_SQ"))
    },
    "chromadb": Engine("chromadb", build_chroma, open_chroma, EFS),
}
