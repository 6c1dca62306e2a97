"""Facts about one request, collected while it is answered. Whoever answers is handed the trace and adds to it."""

import math
import secrets
import time
from dataclasses import dataclass, field
from types import TracebackType

from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Floats, SearchOutcome
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import Options


@dataclass(frozen=True)
class SearchRecord:
    """A search made for a request; in an experiment there may be one for each arm."""

    generation: Generation
    options: Options
    vectors: Floats
    """The queries, float32 [n, dim]."""
    outcome: SearchOutcome
    arm: str = ""
    own_plan: bool = False
    """Whether the request brought a plan, or the recall to choose a plan by."""


@dataclass
class Timing:
    """Status code and time of what a ``with`` block does."""

    code: str = "CANCELLED"
    total_ms: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    arm: str = ""
    """The experiment's arm, if any."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.begun

    def __enter__(self) -> "Timing":
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.total_ms = 1000 * self.elapsed_s
        if error is None:
            self.code = "OK"
        elif isinstance(error, Exception):
            self.code = error.code.name if isinstance(error, RetrievalError) else "INTERNAL"


@dataclass(kw_only=True)
class Trace(Timing):
    """One request. Its payload is dropped when the request, and any recall sample of it, has ended."""

    method: str
    request_id: str = field(default_factory=lambda: secrets.token_hex(12))
    tenant: str = ""
    allowed_s: float = math.inf
    """Seconds until the caller's gRPC deadline, when the request arrived."""
    k: int | None = None
    num_queries: int | None = None
    experiment: str = ""
    forced: str = ""
    """Why the request did not go to the arm of its session, or of chance; a comparison leaves such requests out."""
    session: str = ""
    info: pb.SearchInfo | None = None
    results: list[pb.HitList] = field(default_factory=list)
    """Hits of each query, in the order of the request."""
    searches: list[SearchRecord] = field(default_factory=list)
    arms: list[Timing] = field(default_factory=list)
    """The arms that were asked."""
    feedback: pb.FeedbackRequest | None = None

    def time_arm(self, arm: str) -> Timing:
        """The timing of an arm that is asked now."""
        self.arms.append(Timing(arm=arm))
        return self.arms[-1]
