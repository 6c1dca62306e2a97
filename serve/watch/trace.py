"""What is known of one request while it is answered. The ingress begins a trace; whoever learns something adds it."""

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Floats, Found
from lookalike.serve.wire.requests import Options


@dataclass(frozen=True)
class Searched:
    """A search that was made for a request: of its arm, in an experiment."""

    generation: Generation
    options: Options
    vectors: Floats
    """The queries, float32 [n, dim]."""
    found: Found
    arm: str = ""
    own_plan: bool = False
    """The request brought a plan, or the recall to choose one by."""
    degraded: bool = False


class Outcome(NamedTuple):
    """What an arm did for a request: the status code and the milliseconds it took."""

    arm: str
    code: str
    duration_ms: float


@dataclass
class Trace:
    """One request. Holds no payload longer than the request and a recall sample of it last."""

    method: str
    request_id: str = field(default_factory=lambda: secrets.token_hex(12))
    begun: float = field(default_factory=time.perf_counter)
    code: str = "UNKNOWN"
    tenant: str = ""
    k: int | None = None
    num_queries: int | None = None
    experiment: str = ""
    arm: str = ""
    forced: str = ""
    """Why the arm is not the one that chance, or the session, would have given; such requests compare nothing."""
    session: str = ""
    info: pb.SearchInfo | None = None
    results: list[pb.HitList] = field(default_factory=list)
    """Hits of each query, in the order they were sent."""
    searches: list[Searched] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    """What each arm that was asked did."""
    feedback: pb.FeedbackRequest | None = None
    total_ms: float = 0.0
    """Time in the ingress, once it has ended."""
    outer: "Trace | None" = None
    """The stream that the request is part of."""


_CURRENT: ContextVar[Trace | None] = ContextVar("lookalike_trace", default=None)


def begin(method: str) -> Trace:
    """A new trace, current in this task and in those it starts; one within another is of the same tenant."""
    outer = _CURRENT.get()
    trace = Trace(method, tenant="" if outer is None else outer.tenant, outer=outer)
    _CURRENT.set(trace)
    return trace


def end(trace: Trace, code: str) -> None:
    """The request has been answered, or has failed."""
    trace.code, trace.total_ms = code, (time.perf_counter() - trace.begun) * 1000
    _CURRENT.set(trace.outer)


def current() -> Trace:
    """The trace of the request that this task works on; one that nobody sees where none was begun."""
    return _CURRENT.get() or Trace("")
