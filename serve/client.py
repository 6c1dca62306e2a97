"""The Python client of the retrieval service; needs grpcio, protobuf and numpy, nothing else.

    with Client("127.0.0.1:9000") as client:
        for hit in client.search(image=open("chair.jpg", "rb").read(), k=5).hits:
            print(hit.id, hit.score, hit.metadata)

``lookalike.serve.local.LocalClient`` has the same interface over an index on disk, without a server.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from lookalike.serve.errors import RetrievalError
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:9000"
MAX_MESSAGE_BYTES = 64 << 20
RETRY = json.dumps({"methodConfig": [{
    "name": [{"service": "lookalike.v1.RetrievalService"}],
    "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2.0,
                    "retryableStatusCodes": ["UNAVAILABLE"]},
}]})  # fmt: skip
"""gRPC service config: calls are reads, so one that found no server is repeated, within its deadline."""
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


class Client:
    """Blocking client; safe to share between threads. Every method raises ``RetrievalError`` with a gRPC status.

    ``address`` is ``host:port``; ``timeout_s`` the deadline of each call; ``application`` the Serve application to
    ask where several share the port; ``channel`` replaces the plain-text channel (TLS, interceptors).
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float = 30.0, application: str = "",
        channel: grpc.Channel | None = None,
    ) -> None:  # fmt: skip
        self._metadata = (("application", application),) if application else ()
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_retries", 1),
                   ("grpc.lb_policy_name", "round_robin"), ("grpc.service_config", RETRY)]  # fmt: skip
        self.address, self.timeout_s = address, timeout_s
        self._channel = grpc.insecure_channel(address, options=options) if channel is None else channel
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def search(
        self, *, image: bytes | None = None, vector: FloatArray | None = None, image_id: str | None = None,
        k: int = 10, plan: PlanLike | None = None, timeout_ms: int = 0, model_fingerprint: str = "",
        allow_partial: bool = False,
    ) -> SearchResult:  # fmt: skip
        """The ``k`` stored images nearest to one query: exactly one of ``image``, ``vector`` and ``image_id``.

        ``vector`` is float [dim], normalised or not. ``model_fingerprint`` names the model that made it: the service
        refuses those of another one. ``timeout_ms`` bounds the work in the service; with ``allow_partial`` it answers
        with the shards it could reach by then.
        """
        given = [query for query in (image, vector, image_id) if query is not None]
        if len(given) != 1:
            raise ValueError(f"{len(given)} queries given; pass exactly one of image=, vector= and image_id=")
        options = _options(k, plan, timeout_ms, model_fingerprint, allow_partial)
        reply = self._call("Search", pb.SearchRequest(query=_query(given[0]), options=options))
        return SearchResult(_hits(reply.hits), _info(reply.info))

    def search_batch(
        self, queries: Sequence[Query] | FloatArray, *, k: int = 10, plan: PlanLike | None = None,
        timeout_ms: int = 0, model_fingerprint: str = "", allow_partial: bool = False,
    ) -> list[SearchResult]:  # fmt: skip
        """One result a query (see ``Query``; a float [n, dim] array is n vectors), in one round trip."""
        options = _options(k, plan, timeout_ms, model_fingerprint, allow_partial)
        reply = self._call("SearchBatch", pb.SearchBatchRequest(queries=[_query(q) for q in queries], options=options))
        info = _info(reply.info)
        return [SearchResult(_hits(result.hits), info) for result in reply.results]

    def embed(self, images: Sequence[bytes]) -> Embeddings:
        """Vectors of encoded images, one row each."""
        reply = self._call("Embed", pb.EmbedRequest(images=images))
        vectors = np.frombuffer(b"".join(reply.vectors), "<f4").reshape(len(reply.vectors), reply.dim)
        return Embeddings(vectors, reply.model_fingerprint)

    def describe(self) -> Description:
        """What the service serves."""
        reply = self._call("Describe", pb.DescribeRequest())
        limits = {bound.name: int(getattr(reply.limits, bound.name)) for bound in pb.Limits.DESCRIPTOR.fields}
        return Description(
            version=reply.version, generation=reply.index_generation, model_fingerprint=reply.model_fingerprint,
            dim=reply.dim, dims=tuple(reply.dims), num_rows=reply.num_rows, num_shards=reply.num_shards,
            plan=_plan(reply.plan), placement=reply.placement, has_encoder=reply.has_encoder, limits=limits,
        )  # fmt: skip

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the address accepts connections; raises UNAVAILABLE after ``timeout_s`` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            message = f"nothing answers at {self.address} after {timeout_s:g} s; start it with `lookalike serve`"
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, message) from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=self.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RetrievalError(error.code(), error.details() or "no details") from None


def _query(query: Query) -> pb.Query:
    if isinstance(query, bytes):
        return pb.Query(image=query)
    if isinstance(query, str):
        return pb.Query(image_id=query)
    vector = np.asarray(query)
    if vector.ndim != 1:
        raise ValueError(f"a vector query has one dimension, this has shape {vector.shape}; use search_batch for many")
    return pb.Query(vector=vector.astype("<f4").tobytes())


def _options(
    k: int, plan: PlanLike | None, timeout_ms: int, model_fingerprint: str, allow_partial: bool
) -> pb.SearchOptions:
    if k < 1 or timeout_ms < 0:  # unsigned on the wire
        raise RetrievalError(grpc.StatusCode.INVALID_ARGUMENT, f"k={k}, timeout_ms={timeout_ms}: k must be at least 1 "
                             "and timeout_ms not negative")  # fmt: skip
    sent = None if plan is None else pb.Plan(
        shortlist_dim=plan.shortlist_dim, shortlist_k=plan.shortlist_k, rerank_dim=plan.rerank_dim,
        stages=[pb.PlanStep(dim=dim, keep=keep) for dim, keep in plan.stages], ef_search=plan.ef_search,
        scan=plan.scan, nprobe=plan.nprobe, margins=plan.margins,
    )  # fmt: skip
    return pb.SearchOptions(k=k, plan=sent, timeout_ms=timeout_ms, model_fingerprint=model_fingerprint,
                            allow_partial=allow_partial)  # fmt: skip


def _hits(hits: Any) -> tuple[Hit, ...]:
    return tuple(Hit(hit.id, hit.score, dict(hit.metadata)) for hit in hits)


def _plan(plan: pb.Plan) -> SearchPlan:
    stages = tuple((step.dim, step.keep) for step in plan.stages)
    return SearchPlan(plan.shortlist_dim, plan.shortlist_k, plan.rerank_dim, stages,
                      plan.ef_search if plan.HasField("ef_search") else None, plan.scan,
                      plan.nprobe if plan.HasField("nprobe") else None, tuple(plan.margins))  # fmt: skip


def _info(info: pb.SearchInfo) -> SearchInfo:
    times = {part.stage: part.duration_ms for part in info.stage_times}
    return SearchInfo(_plan(info.plan), info.index_generation, info.model_fingerprint, info.coverage.shards_answered,
                      info.coverage.shards_asked, times)  # fmt: skip
