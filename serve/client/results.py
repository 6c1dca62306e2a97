"""What the clients take and give, and its way to and from messages; needs grpcio, protobuf and numpy, nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import grpc
import numpy as np
import numpy.typing as npt

from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import CODES, RetrievalError

FloatArray = npt.NDArray[np.floating[Any]]
Query = bytes | str | FloatArray
"""An encoded image (bytes), the id of a stored image (str) or a vector (1-d array)."""


class PlanLike(Protocol):
    """What ``plan=`` takes: ``SearchPlan`` here, or ``lookalike.retrieval.plan.Plan``."""

    @property
    def shortlist_dim(self) -> int: ...  # noqa: D102
    @property
    def shortlist_k(self) -> int: ...  # noqa: D102
    @property
    def stages(self) -> tuple[tuple[int, int], ...]: ...  # noqa: D102
    @property
    def rerank_dim(self) -> int: ...  # noqa: D102
    @property
    def ef_search(self) -> int | None: ...  # noqa: D102
    @property
    def nprobe(self) -> int | None: ...  # noqa: D102
    @property
    def margins(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def scan(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class SearchPlan:
    """Shortlist ``shortlist_k`` by the first ``shortlist_dim`` dimensions, funnel ``stages`` (dim, keep), re-rank."""

    shortlist_dim: int
    shortlist_k: int
    rerank_dim: int
    stages: tuple[tuple[int, int], ...] = ()
    ef_search: int | None = None
    scan: bool = False
    nprobe: int | None = None
    margins: tuple[float, ...] = ()


@dataclass(frozen=True)
class Hit:
    """A stored image: its id, its cosine similarity to the query and the columns stored with it."""

    id: str
    score: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    arm: str = ""
    """In an interleaving experiment, the arm that brought it."""


@dataclass(frozen=True)
class SearchInfo:
    """What produced an answer."""

    plan: SearchPlan
    generation: str
    """Fingerprint of the index."""
    model_fingerprint: str
    shards_answered: int
    shards_asked: int
    times_ms: Mapping[str, float]
    """Stage -> milliseconds inside the service."""
    request_id: str = field(default="", compare=False)
    """Names this answer in ``feedback``."""
    arm: str = ""
    """The experiment's arm that answered; empty without one, ``interleave`` when two did."""
    degraded: bool = False
    """The service was too busy for its plan: ``plan`` is a cheaper one."""

    @property
    def coverage(self) -> float:
        """Share of the shards that answered; below 1 only where ``allow_partial`` was asked for."""
        return self.shards_answered / max(1, self.shards_asked)


@dataclass(frozen=True)
class SearchResult:
    """Hits of one query, best first, and what produced them."""

    hits: tuple[Hit, ...]
    info: SearchInfo

    @property
    def ids(self) -> list[str]:
        """Ids of the hits, best first."""
        return [hit.id for hit in self.hits]


@dataclass(frozen=True)
class Embeddings:
    """Vectors float32 [n, dim], not normalised, and the model that made them."""

    vectors: npt.NDArray[np.float32]
    model_fingerprint: str


@dataclass(frozen=True)
class Description:
    """What a service serves; ``limits`` are its bounds by name."""

    version: str
    generation: str
    model_fingerprint: str
    dim: int
    dims: tuple[int, ...]
    num_rows: int
    num_shards: int
    plan: SearchPlan
    placement: str
    has_encoder: bool
    limits: Mapping[str, int]
    columns: tuple[str, ...] = ()
    """Stored columns that ``where`` may name."""


class SearchSettings(TypedDict, total=False):
    """Keyword arguments of every search."""

    k: int
    """Hits wanted; 10 by default."""
    plan: PlanLike | None
    """Takes the place of the service's plan."""
    min_recall: float | None
    """Let the service take the cheapest plan that was measured to reach this recall, instead of ``plan``."""
    where: Mapping[str, Sequence[str]] | None
    """Column -> values of which a hit's column holds one; all conditions must hold."""
    timeout_ms: int
    """Bounds the work in the service."""
    model_fingerprint: str
    """The model that made the vectors: the service refuses those of another one."""
    allow_partial: bool
    """Answer with the shards that could be reached, with ``coverage`` below 1."""
    session: str
    """Whoever searches, as any stable string: in an experiment it decides the arm."""


def to_query(query: Query) -> pb.Query:
    """The message of one query."""
    if isinstance(query, bytes):
        return pb.Query(image=query)
    if isinstance(query, str):
        return pb.Query(image_id=query)
    vector = np.asarray(query)
    if vector.ndim != 1:
        raise ValueError(f"a vector query has one dimension, this has shape {vector.shape}; use search_batch for many")
    return pb.Query(vector=vector.astype("<f4").tobytes())


def to_options(settings: SearchSettings) -> pb.SearchOptions:
    """The message of ``settings``."""
    k, timeout_ms, plan = settings.get("k", 10), settings.get("timeout_ms", 0), settings.get("plan")
    if k < 1:  # unsigned on the wire, as is timeout_ms
        raise RetrievalError(grpc.StatusCode.INVALID_ARGUMENT, f"k={k} is less than 1; ask for 1 or more")
    if timeout_ms < 0:
        raise RetrievalError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"timeout_ms={timeout_ms} is negative; give milliseconds, or 0 for the service's own limit",
        )
    sent = (
        None
        if plan is None
        else pb.Plan(
            shortlist_dim=plan.shortlist_dim,
            shortlist_k=plan.shortlist_k,
            rerank_dim=plan.rerank_dim,
            stages=[pb.PlanStep(dim=dim, keep=keep) for dim, keep in plan.stages],
            ef_search=plan.ef_search,
            scan=plan.scan,
            nprobe=plan.nprobe,
            margins=plan.margins,
        )
    )
    filters = [pb.Filter(column=column, values=values) for column, values in (settings.get("where") or {}).items()]
    return pb.SearchOptions(
        k=k,
        plan=sent,
        timeout_ms=timeout_ms,
        model_fingerprint=settings.get("model_fingerprint", ""),
        allow_partial=settings.get("allow_partial", False),
        filters=filters,
        min_recall=settings.get("min_recall"),
        session=settings.get("session", ""),
    )


def to_batch(queries: Sequence[Query] | FloatArray, settings: SearchSettings) -> pb.SearchBatchRequest:
    """The message of many queries."""
    return pb.SearchBatchRequest(queries=[to_query(query) for query in queries], options=to_options(settings))


@dataclass(frozen=True)
class StoredRow:
    """An image to store: its id, its content (an encoded image or a vector) and columns by name."""

    id: str
    content: bytes | FloatArray
    metadata: Mapping[str, str] = field(default_factory=dict)


def to_upsert(rows: Iterable[StoredRow], model_fingerprint: str) -> pb.UpsertRequest:
    """The message of rows to store."""
    sent = []
    for row in rows:
        content = row.content
        kind = {"image": content} if isinstance(content, bytes) else {"vector": np.asarray(content, "<f4").tobytes()}
        sent.append(pb.Row(id=row.id, metadata=row.metadata, **kind))
    return pb.UpsertRequest(rows=sent, model_fingerprint=model_fingerprint)


def one_of(image: bytes | None, vector: FloatArray | None, image_id: str | None) -> Query:
    """The query that was given; ``ValueError`` unless it is exactly one."""
    given = [query for query in (image, vector, image_id) if query is not None]
    if len(given) != 1:
        raise ValueError(f"{len(given)} queries given; pass exactly one of image=, vector= and image_id=")
    return given[0]


def from_response(reply: pb.SearchResponse) -> SearchResult:
    """The result of one query."""
    return SearchResult(_hits(reply.hits), _info(reply.info))


def from_batch(reply: pb.SearchBatchResponse) -> list[SearchResult]:
    """One result a query."""
    info = _info(reply.info)
    return [SearchResult(_hits(result.hits), info) for result in reply.results]


def from_stream(reply: pb.SearchStreamResponse) -> "list[SearchResult] | RetrievalError":
    """One result a query of a batch, or why it was not answered."""
    if reply.WhichOneof("outcome") == "failure":
        return RetrievalError(CODES.get(reply.failure.code, grpc.StatusCode.UNKNOWN), reply.failure.message)
    return from_batch(reply.batch)


def from_embeddings(reply: pb.EmbedResponse) -> Embeddings:
    """Vectors of an answer."""
    vectors = np.frombuffer(b"".join(reply.vectors), "<f4").reshape(len(reply.vectors), reply.dim)
    return Embeddings(vectors, reply.model_fingerprint)


def from_description(reply: pb.DescribeResponse) -> Description:
    """What is served."""
    limits = {bound.name: int(getattr(reply.limits, bound.name)) for bound in pb.Limits.DESCRIPTOR.fields}
    return Description(
        version=reply.version,
        generation=reply.index_generation,
        model_fingerprint=reply.model_fingerprint,
        dim=reply.dim,
        dims=tuple(reply.dims),
        num_rows=reply.num_rows,
        num_shards=reply.num_shards,
        plan=_plan(reply.plan),
        placement=reply.placement,
        has_encoder=reply.has_encoder,
        limits=limits,
        columns=tuple(reply.columns),
    )


def _hits(hits: Any) -> tuple[Hit, ...]:
    return tuple(Hit(hit.id, hit.score, dict(hit.metadata), hit.arm) for hit in hits)


def _plan(plan: pb.Plan) -> SearchPlan:
    stages = tuple((step.dim, step.keep) for step in plan.stages)
    return SearchPlan(
        plan.shortlist_dim,
        plan.shortlist_k,
        plan.rerank_dim,
        stages,
        plan.ef_search if plan.HasField("ef_search") else None,
        plan.scan,
        plan.nprobe if plan.HasField("nprobe") else None,
        tuple(plan.margins),
    )


def _info(info: pb.SearchInfo) -> SearchInfo:
    times = {part.stage: part.duration_ms for part in info.stage_times}
    return SearchInfo(
        _plan(info.plan),
        info.index_generation,
        info.model_fingerprint,
        info.coverage.shards_answered,
        info.coverage.shards_asked,
        times,
        info.request_id,
        info.arm,
        info.degraded,
    )
