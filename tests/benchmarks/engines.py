"""Engines of the retrieval comparison that are libraries: ours, faiss, usearch, hnswlib, SVS, ScaNN.

An engine is a function that builds an index in a folder and a function that opens the folder in another process, as a
restarted service would. Vectors and queries are float32 of unit length; HNSW graphs have the same degree and build
effort everywhere. The databases are in ``engines_stores.py``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from lookalike.retrieval.ranking import Floats, Rows

M, EF_CONSTRUCTION = 16, 120
"""Links per node of every graph (twice as many on its lowest layer), and candidates considered for each row."""
EFS = ({"ef": 16}, {"ef": 32}, {"ef": 64}, {"ef": 128}, {"ef": 256})
Setting = Mapping[str, Any]
Steps = tuple[tuple[int, int], ...]
Search = Callable[[Floats], Rows]
"""Queries float32 [n, dim] -> rows int64 [n, k]."""


class Engine(NamedTuple):
    """A way to search, and the settings to measure."""

    module: str
    """Module that the engine needs, or it is reported missing."""
    build: Callable[[Floats, str], None]
    """Build from (vectors [n, dim], an empty folder)."""
    open: Callable[[str, int], Callable[..., Search]]
    """(that folder, dim) -> a function from (k, a setting's values) to the search."""
    settings: tuple[Setting, ...]
    batch: bool = True
    """Whether it has a call for many queries."""


def nested_dims(dim: int) -> tuple[int, ...]:
    """Powers of two from 8, and the full size."""
    return (*(1 << power for power in range(3, 11) if 1 << power < dim), dim)


def prefixes(dim: int) -> tuple[int, ...]:
    """Prefixes for engines with a first stage."""
    return tuple(prefix for prefix in (64, 128) if prefix < dim)


def row_numbers(ids: Any, k: int) -> Rows:
    """Rows int64 [n, k] from lists of ids; -1 if a list is short."""
    rows = np.full((len(ids), k), -1, np.int64)
    for row, found in zip(rows, ids, strict=True):
        row[: len(found)] = list(map(int, found))
    return rows


def build_ours(vectors: Floats, folder: str, dtype: Literal["float16", "int8"], staged: bool) -> None:
    """A shard of ``dtype`` with int8 graphs over 64-d and 128-d, or only over the full vectors."""
    from tests.benchmarks.retrieval import open_ours

    dim = vectors.shape[1]
    open_ours(
        f"{folder}/shard",
        vectors,
        dims=nested_dims(dim),
        dtype=dtype,
        shortlist="graph",
        shortlist_dims=prefixes(dim) if staged else (dim,),
    )


def open_ours_again(folder: str, dim: int) -> Callable[..., Search]:
    """The searcher that serving wraps; ``steps`` are (dim, survivors) of a funnel, ``margins`` its early exits.

    Without ``p`` the graph over the full vectors answers, in one stage.
    """
    from lookalike.retrieval.plan import Plan
    from lookalike.retrieval.shard_searcher import ShardSearcher

    shard = ShardSearcher.open(f"{folder}/shard")

    def prepare(k: int, K: int, p: int = 0, steps: Steps = (), margins: tuple[float, ...] = ()) -> Search:
        kept = tuple((at, max(k, survivors)) for at, survivors in steps if p < at < dim)
        plan = Plan(
            shortlist_dim=p or dim, shortlist_k=max(k, K), stages=kept, rerank_dim=dim, margins=margins[: 1 + len(kept)]
        )
        return lambda queries: shard.search(queries, k, plan).rows

    return prepare


OURS: tuple[Setting, ...] = (
    *({"p": 64, "K": size} for size in (20, 40, 70, 100)),
    {"p": 64, "K": 100, "steps": ((512, 25),)},
    {"p": 64, "K": 100, "steps": ((512, 25),), "margins": (0.15, 0.05)},
    {"p": 64, "K": 200, "steps": ((256, 60), (1024, 20))},
    *({"p": 128, "K": size} for size in (20, 30, 40, 50, 70)),
    {"p": 128, "K": 50, "steps": ((512, 20),)},
    {"p": 128, "K": 50, "steps": ((512, 20),), "margins": (0.1, 0.03)},
    {"p": 128, "K": 70, "steps": ((512, 25),)},
    {"p": 128, "K": 70, "steps": ((512, 25),), "margins": (0.1, 0.03)},
    {"p": 128, "K": 150, "steps": ((512, 30),)},
    {"p": 128, "K": 300, "steps": ((512, 60),)},
    {"p": 128, "K": 600, "steps": ((256, 150), (1024, 40))},
)


OURS_FULL: tuple[Setting, ...] = tuple({"K": size} for size in (10, 16, 24, 40, 64, 128))


def build_exact(vectors: Floats, folder: str) -> None:
    """A scan of all rows."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, f"{folder}/index")


def build_faiss_hnsw(vectors: Floats, folder: str) -> None:
    """A graph over the full vectors."""
    import faiss

    index = faiss.IndexHNSWFlat(vectors.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    index.add(vectors)
    faiss.write_index(index, f"{folder}/index")


def build_faiss_refined(vectors: Floats, folder: str, codes: str, prefix: int) -> None:
    """An index of ``codes`` (faiss's factory syntax) over a prefix, re-ranked by the full vectors.

    Lists of codes get the random rotation that RaBitQ asks for.
    """
    import faiss

    dim = vectors.shape[1]
    size = min(prefix, dim)
    nlist = max(1, min(round(2 * len(vectors) ** 0.5), len(vectors) // 39))
    inner = faiss.index_factory(size, codes.format(nlist=nlist), faiss.METRIC_INNER_PRODUCT)
    base = faiss.IndexPreTransform(inner)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efConstruction = EF_CONSTRUCTION
    else:
        base.prepend_transform(faiss.RandomRotationMatrix(size, size))
    base.prepend_transform(faiss.NormalizationTransform(size, 2.0))
    base.prepend_transform(faiss.RemapDimensionsTransform(dim, size, False))
    index = faiss.IndexRefine(base, faiss.IndexFlatIP(dim))
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, f"{folder}/index")


def open_faiss(folder: str, dim: int) -> Callable[..., Search]:
    """Any of the faiss indexes: ``ef`` or ``nprobe`` is the effort, ``K`` the rows re-ranked."""
    import faiss

    index = faiss.read_index(f"{folder}/index")
    module: Any = faiss  # its stubs do not know these classes' keywords

    def prepare(k: int, ef: int = 0, nprobe: int = 0, K: int = 0) -> Search:
        settings: Any = None
        if ef:
            settings = module.SearchParametersHNSW(efSearch=max(ef, K))
        elif nprobe:
            settings = module.SearchParametersIVF(nprobe=nprobe)
        if K:
            inner = module.SearchParametersPreTransform(index_params=settings)
            settings = module.IndexRefineSearchParameters(k_factor=max(1, K / k), base_index_params=inner)
            settings.keep = inner  # faiss does not own what it points to
        return lambda queries: index.search(queries, k, params=settings)[1]

    return prepare


def build_usearch(vectors: Floats, folder: str, number: str) -> None:
    """A graph over the full vectors in number format ``number``."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="cos", dtype=number, connectivity=M, expansion_add=EF_CONSTRUCTION)
    index.add(np.arange(len(vectors)), vectors, threads=1)
    index.save(f"{folder}/index")


def open_usearch(folder: str, dim: int) -> Callable[..., Search]:
    """The whole index in memory."""
    from usearch.index import Index

    index = Index.restore(f"{folder}/index")

    def prepare(k: int, ef: int) -> Search:
        index.expansion_search = ef

        def search(queries: Floats) -> Rows:
            found = index.search(queries[0] if len(queries) == 1 else queries, k, threads=1)
            return np.atleast_2d(found.keys).astype(np.int64)

        return search

    return prepare


def build_hnswlib(vectors: Floats, folder: str) -> None:
    """A graph over the full vectors."""
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), M=M, ef_construction=EF_CONSTRUCTION)
    index.set_num_threads(1)
    index.add_items(vectors)
    index.save_index(f"{folder}/index")


def open_hnswlib(folder: str, dim: int) -> Callable[..., Search]:
    """The whole index in memory."""
    import hnswlib

    index = hnswlib.Index("ip", dim)
    index.load_index(f"{folder}/index")
    index.set_num_threads(1)

    def prepare(k: int, ef: int) -> Search:
        index.set_ef(ef)
        return lambda queries: index.knn_query(queries, k)[0].astype(np.int64)

    return prepare


def build_svs(vectors: Floats, folder: str, lean: bool) -> None:
    """A Vamana graph over float16 vectors, or LeanVec: over 8-bit projections, re-ranked by 8-bit vectors."""
    import svs

    dim = vectors.shape[1]
    data: Any = vectors.astype(np.float16)
    if lean:
        svs.write_vecs(vectors, f"{folder}/vectors.fvecs")
        data = svs.VectorDataLoader(f"{folder}/vectors.fvecs", svs.DataType.float32, dims=dim)
        data = svs.LeanVecLoader(data, min(128, dim))
    degree = svs.VamanaBuildParameters(graph_max_degree=2 * M, window_size=2 * EF_CONSTRUCTION)
    index = svs.Vamana.build(degree, data, svs.DistanceType.MIP, num_threads=1)
    index.save(f"{folder}/config", f"{folder}/graph", f"{folder}/data")


def open_svs(folder: str, dim: int, lean: bool) -> Callable[..., Search]:
    """The whole index in memory."""
    import svs

    data: Any = svs.VectorDataLoader(f"{folder}/data", svs.DataType.float16)
    if lean:
        data = svs.LeanVecLoader(f"{folder}/data")
    index = svs.Vamana(f"{folder}/config", svs.GraphLoader(f"{folder}/graph"), data, svs.DistanceType.MIP)

    def prepare(k: int, ef: int) -> Search:
        index.search_window_size = max(ef, k)
        return lambda queries: index.search(queries, k)[0].astype(np.int64)

    return prepare


def build_scann(vectors: Floats, folder: str) -> None:
    """Lists of anisotropic 4-bit codes, re-ranked by the full vectors."""
    from scann.scann_ops.py import scann_ops_pybind

    leaves = round(2 * len(vectors) ** 0.5)
    builder = scann_ops_pybind.builder(vectors, 10, "dot_product").set_n_training_threads(1)
    builder = builder.tree(leaves, 20, training_sample_size=min(len(vectors), 64 * leaves))
    builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build().serialize(folder)


def open_scann(folder: str, dim: int) -> Callable[..., Search]:
    """The whole index in memory; ``nprobe`` leaves are probed, ``K`` rows re-ranked."""
    from scann.scann_ops.py import scann_ops_pybind

    searcher = scann_ops_pybind.load_searcher(folder)

    def prepare(k: int, nprobe: int, K: int) -> Search:
        def search(queries: Floats) -> Rows:
            if len(queries) == 1:
                return np.asarray(searcher.search(queries[0], k, K, nprobe)[0], np.int64)[None]
            return np.asarray(searcher.search_batched(queries, k, K, nprobe)[0], np.int64)

        return search

    return prepare


PROBES = tuple(
    {"nprobe": nprobe, "K": size}
    for nprobe, size in ((8, 30), (16, 50), (32, 50), (32, 100), (64, 100), (128, 100), (128, 200))
)
REFINED = tuple({"ef": size, "K": size} for size in (20, 30, 50, 70, 100, 200))
LIBRARIES = {
    **{
        name: Engine(
            "lookalike.retrieval.searcher",
            partial(build_ours, dtype=dtype, staged=name != "ours-full"),
            open_ours_again,
            OURS_FULL if name == "ours-full" else OURS,
        )
        for name, dtype in (("ours", "float16"), ("ours-int8", "int8"), ("ours-full", "float16"))
    },
    "faiss-exact": Engine("faiss", build_exact, open_faiss, ({},)),
    "faiss-hnsw": Engine("faiss", build_faiss_hnsw, open_faiss, EFS),
    **{
        f"faiss-hnsw{prefix}-refine": Engine(
            "faiss", partial(build_faiss_refined, codes=f"HNSW{M}", prefix=prefix), open_faiss, REFINED
        )
        for prefix in (64, 128)
    },
    **{
        f"faiss-rabitq{prefix}-refine": Engine(
            "faiss", partial(build_faiss_refined, codes="IVF{nlist},RaBitQfs", prefix=prefix), open_faiss, PROBES
        )
        for prefix in (128, 512)
    },
    **{
        f"usearch-{number}": Engine("usearch", partial(build_usearch, number=number), open_usearch, EFS)
        for number in ("f32", "f16", "i8")
    },
    "hnswlib": Engine("hnswlib", build_hnswlib, open_hnswlib, EFS),
    "svs": Engine("svs", partial(build_svs, lean=False), partial(open_svs, lean=False), EFS),
    "svs-leanvec": Engine("svs", partial(build_svs, lean=True), partial(open_svs, lean=True), EFS),
    "scann": Engine("scann.scann_ops.py.scann_ops_pybind", build_scann, open_scann, PROBES),
}
