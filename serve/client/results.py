"""What the clients return, converted from messages. Needs only grpcio, protobuf and numpy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import CODES, RetrievalError


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
