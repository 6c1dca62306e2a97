"""What the clients take and return, converted to and from messages. Needs only grpcio, protobuf and numpy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import grpc
import numpy as np
import numpy.typing as npt

from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import CODES, RetrievalError, invalid
from lookalike.serve.wire.plans import PlanLike, to_plan

FloatArray = npt.NDArray[np.floating[Any]]
Query = bytes | str | FloatArray
"""An encoded image (bytes), the id of a stored image (str) or a vector (1-d array)."""


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
    """A stored image: its id, its cosine similarity to the query, and its stored columns."""

    id: str
    score: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    arm: str = ""
    """The arm that contributed this hit, in an interleaving experiment."""


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
    """Identifies this answer in ``feedback``."""
    arm: str = ""
    """The experiment's arm that answered: empty outside experiments, ``interleave`` if two arms did."""
    degraded: bool = False
    """Whether ``plan`` is cheaper than the service's usual plan because of the load."""

    @property
    def coverage(self) -> float:
        """Share of the shards that answered; below 1 only with ``allow_partial``."""
        return self.shards_answered / max(1, self.shards_asked)


@dataclass(frozen=True)
class SearchResult:
    """Hits of one query, best first, with what produced them."""

    hits: tuple[Hit, ...]
    info: SearchInfo

    @property
    def ids(self) -> list[str]:
        """Ids of the hits, best first."""
        return [hit.id for hit in self.hits]


@dataclass(frozen=True)
class Embeddings:
    """Vectors float32 [n, dim], not normalised, with the fingerprint of their model."""

    vectors: npt.NDArray[np.float32]
    model_fingerprint: str


@dataclass(frozen=True)
class Description:
    """What a service serves; ``limits`` maps names to bounds."""

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
    """Number of hits; 10 by default."""
    plan: PlanLike | None
    """Replaces the service's plan."""
    min_recall: float | None
    """Instead of ``plan``: take the cheapest plan with at least this measured recall."""
    where: Mapping[str, Sequence[str]] | None
    """Column -> allowed values; a hit meets all conditions."""
    timeout_ms: int
    """Time limit of the work in the service, in milliseconds."""
    model_fingerprint: str
    """The model that made the vectors; the service refuses vectors of another model."""
    allow_partial: bool
    """Accept an answer from the reachable shards alone, with ``coverage`` below 1."""
    session: str
    """Any stable string that identifies the searcher; in an experiment it decides the arm."""


def to_query(query: Query) -> pb.Query:
    """Return the message of one query; ``ValueError`` unless a vector has one dimension."""
    if isinstance(query, bytes):
        return pb.Query(image=query)
    if isinstance(query, str):
        return pb.Query(image_id=query)
    vector = np.asarray(query)
    if vector.ndim != 1:
        raise ValueError(f"a vector query has one dimension, this has shape {vector.shape}; use search_batch for many")
    return pb.Query(vector=vector.astype("<f4").tobytes())


def to_options(settings: SearchSettings) -> pb.SearchOptions:
    """Return the message of ``settings``; INVALID_ARGUMENT for numbers that the wire cannot carry."""
    k, timeout_ms, plan = settings.get("k", 10), settings.get("timeout_ms", 0), settings.get("plan")
    if k < 1:  # unsigned on the wire, as is timeout_ms
        raise invalid(f"k={k} is less than 1; ask for 1 or more")
    if timeout_ms < 0:
        raise invalid(f"timeout_ms={timeout_ms} is negative; give milliseconds, or 0 for the service's own limit")
    filters = [pb.Filter(column=column, values=values) for column, values in (settings.get("where") or {}).items()]
    rest: Any = {name: settings.get(name) for name in ("model_fingerprint", "allow_partial", "min_recall", "session")}
    plan_message = None if plan is None else to_plan(plan)
    return pb.SearchOptions(k=k, plan=plan_message, timeout_ms=timeout_ms, filters=filters, **rest)


def to_batch(queries: Sequence[Query] | FloatArray, settings: SearchSettings) -> pb.SearchBatchRequest:
    """Return the message of many queries with the same settings."""
    return pb.SearchBatchRequest(queries=[to_query(query) for query in queries], options=to_options(settings))


@dataclass(frozen=True)
class StoredRow:
    """A row to store: an id, an encoded image or a vector, and columns by name."""

    id: str
    content: bytes | FloatArray
    metadata: Mapping[str, str] = field(default_factory=dict)


def to_upsert(rows: Iterable[StoredRow], model_fingerprint: str) -> pb.UpsertRequest:
    """Return the message that stores ``rows``."""
    sent = []
    for row in rows:
        content = row.content
        kind = {"image": content} if isinstance(content, bytes) else {"vector": np.asarray(content, "<f4").tobytes()}
        sent.append(pb.Row(id=row.id, metadata=row.metadata, **kind))
    return pb.UpsertRequest(rows=sent, model_fingerprint=model_fingerprint)


def one_of(image: bytes | None, vector: FloatArray | None, image_id: str | None) -> Query:
    """Return the one query that is not None; ``ValueError`` unless there is exactly one."""
    queries = [query for query in (image, vector, image_id) if query is not None]
    if len(queries) != 1:
        raise ValueError(f"{len(queries)} queries given; pass exactly one of image=, vector= and image_id=")
    return queries[0]


def from_response(reply: pb.SearchResponse) -> SearchResult:
    """Return the result of one query."""
    return SearchResult(_hits(reply.hits), _info(reply.info))


def from_batch(reply: pb.SearchBatchResponse) -> list[SearchResult]:
    """Return one result per query."""
    info = _info(reply.info)
    return [SearchResult(_hits(result.hits), info) for result in reply.results]


def from_stream(reply: pb.SearchStreamResponse) -> "list[SearchResult] | RetrievalError":
    """Return one result per query of a stream's batch, or the error of a batch that failed."""
    if reply.WhichOneof("outcome") == "failure":
        return RetrievalError(CODES.get(reply.failure.code, grpc.StatusCode.UNKNOWN), reply.failure.message)
    return from_batch(reply.batch)


def from_embeddings(reply: pb.EmbedResponse) -> Embeddings:
    """Return the vectors of an answer as one array."""
    vectors = np.frombuffer(b"".join(reply.vectors), "<f4").reshape(len(reply.vectors), reply.dim)
    return Embeddings(vectors, reply.model_fingerprint)


def from_description(reply: pb.DescribeResponse) -> Description:
    """Return the description of what is served."""
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
        limits={bound.name: int(getattr(reply.limits, bound.name)) for bound in pb.Limits.DESCRIPTOR.fields},
        columns=tuple(reply.columns),
    )


def _hits(hits: Any) -> tuple[Hit, ...]:
    return tuple(Hit(hit.id, hit.score, dict(hit.metadata), hit.arm) for hit in hits)


def _plan(plan: pb.Plan) -> SearchPlan:
    return SearchPlan(
        plan.shortlist_dim,
        plan.shortlist_k,
        plan.rerank_dim,
        tuple((step.dim, step.keep) for step in plan.stages),
        plan.ef_search if plan.HasField("ef_search") else None,
        plan.scan,
        plan.nprobe if plan.HasField("nprobe") else None,
        tuple(plan.margins),
    )


def _info(info: pb.SearchInfo) -> SearchInfo:
    return SearchInfo(
        _plan(info.plan),
        info.index_generation,
        info.model_fingerprint,
        info.coverage.shards_answered,
        info.coverage.shards_asked,
        {part.stage: part.duration_ms for part in info.stage_times},
        info.request_id,
        info.arm,
        info.degraded,
    )
