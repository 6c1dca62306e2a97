"""Check requests: bytes become arrays and plans, or raise INVALID_ARGUMENT with value, rule and remedy."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from lookalike.errors import LookalikeError, UsageError
from lookalike.retrieval.index_meta import IndexMeta
from lookalike.retrieval.plan import Plan, parse_plan
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits
from lookalike.serve.wire.answers import Answer
from lookalike.serve.wire.errors import MAX_ANSWER_BYTES, RetrievalError, invalid, refused, shorten
from lookalike.vision.containers import read_size

DEFAULT_K = 10
MAX_SESSION = 1024
"""Longest session name, in characters."""
MAX_HIT_ID = 1024
"""Longest hit id in feedback, in characters."""
SLICE_HITS = 250
"""Hits written before other requests get their turn: some milliseconds with ten columns."""
LOCAL_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")
"""Begin of the names that gRPC gives to callers on this machine."""
REQUEST_ID = re.compile(r"[0-9a-f]{24}")
FEEDBACK_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class ServicePlans(NamedTuple):
    """The plans of a service, for requests that bring none."""

    default: Plan
    exact: Plan
    measured: tuple[tuple[float, Plan], ...] = ()
    """(measured recall, plan), cheapest first."""

    def reaching(self, recall: float) -> Plan:
        """Return the cheapest plan with at least this measured recall; the exact plan if there is none."""
        return next((plan for measured, plan in self.measured if measured >= recall), self.exact)


class Options(NamedTuple):
    """Checked search options."""

    k: int
    plan: Plan
    timeout_s: float
    allow_partial: bool
    filters: dict[str, list[str]]
    """Column -> allowed values; empty for no condition."""
    degraded: bool = False
    """Whether ``plan`` is cheaper than usual because of the load."""


class Queries(NamedTuple):
    """Queries by kind; each maps a position in the request to its query."""

    vectors: dict[int, npt.NDArray[np.float32]]
    images: dict[int, bytes]
    image_ids: dict[int, str]


def read_options(
    options: pb.SearchOptions, *, limits: RequestLimits, meta: IndexMeta, plans: ServicePlans, timeout_s: float
) -> Options:
    """Return checked options; the service's plan and ``timeout_s`` fill in for what the request leaves out."""
    k = options.k if options.HasField("k") else DEFAULT_K
    if not 1 <= k <= limits.max_k:
        raise invalid(f"k={k} is not between 1 and {limits.max_k}; ask for fewer, or raise limits.max_k of the service")
    if len(options.session) > MAX_SESSION:
        raise invalid(
            f"the session has {len(options.session)} characters, at most {MAX_SESSION} are taken; send a hash of it"
        )
    if options.model_fingerprint and options.model_fingerprint != meta.model_fingerprint:
        raise refused(
            f"the query is of model {shorten(options.model_fingerprint)}, the index of "
            f"{meta.model_fingerprint}; embed the query with the index's model (Embed does), or send the image itself"
        )
    if options.HasField("plan") and options.HasField("min_recall"):
        raise invalid("plan and min_recall are both set; send one: min_recall chooses the plan")
    plan = plans.default
    if options.HasField("plan"):
        plan = read_plan(options.plan, limits=limits, meta=meta)
    elif options.HasField("min_recall"):
        if not 0 < options.min_recall <= 1:
            raise invalid(f"min_recall={options.min_recall:g} is not above 0 and at most 1; 0.95 is a recall of 95%")
        plan = plans.reaching(options.min_recall)
    request_s = options.timeout_ms / 1000 if options.timeout_ms else timeout_s
    filters = read_filters(options.filters, limits=limits, meta=meta)
    return Options(k, plan, min(request_s, timeout_s), options.allow_partial, filters)


def read_filters(filters: Sequence[pb.Filter], *, limits: RequestLimits, meta: IndexMeta) -> dict[str, list[str]]:
    """Return conditions by column; refuse unknown or repeated columns and too many or too long values."""
    conditions: dict[str, list[str]] = {}
    for condition in filters:
        if condition.column not in meta.columns:
            raise invalid(f"filter on {shorten(condition.column)}: the index has the columns {', '.join(meta.columns)}")
        if condition.column in conditions:
            raise invalid(f"two filters on {shorten(condition.column)}; put the values into one")
        conditions[condition.column] = list(condition.values)
    num = sum(len(values) for values in conditions.values())
    if num > limits.max_filter_values:
        raise invalid(
            f"{num} filter values; send at most {limits.max_filter_values}, or raise "
            "limits.max_filter_values of the service"
        )
    size = sum(len(value.encode()) for values in conditions.values() for value in values)
    if size > limits.max_filter_bytes:
        raise invalid(
            f"the filter values have {size} bytes; send at most {limits.max_filter_bytes}, or raise "
            "limits.max_filter_bytes of the service"
        )
    return conditions


def read_plan(message: pb.Plan, *, limits: RequestLimits, meta: IndexMeta) -> Plan:
    """Return the plan of a request; refuse one that the limits or the index do not allow."""
    if message.shortlist_k > limits.max_shortlist_k:
        raise invalid(
            f"plan.shortlist_k={message.shortlist_k} exceeds {limits.max_shortlist_k}; shortlist fewer, or "
            "raise limits.max_shortlist_k of the service"
        )
    for name, entries in (("stages", message.stages), ("margins", message.margins)):
        if len(entries) > len(meta.dims):
            raise invalid(
                f"plan.{name} has {len(entries)} entries; an index of {len(meta.dims)} nested dims takes no "
                "more than that"
            )
    values = {
        "shortlist_dim": message.shortlist_dim,
        "shortlist_k": message.shortlist_k,
        "scan": message.scan,
        "stages": tuple((step.dim, step.keep) for step in message.stages),
        "rerank_dim": message.rerank_dim,
        "ef_search": message.ef_search if message.HasField("ef_search") else None,
        "nprobe": message.nprobe if message.HasField("nprobe") else None,
        "margins": tuple(message.margins),
    }
    try:
        plan = parse_plan(values, "the request")
        check_plan(plan, meta)
    except LookalikeError as error:
        raise invalid(f"{error} (plan {values})") from None
    return plan


def check_plan(plan: Plan, meta: IndexMeta) -> None:
    """Raise ``UsageError`` unless the index can run ``plan``."""
    plan.require_dims(meta.dims)
    if not plan.scan and plan.shortlist_dim not in meta.shortlist_dims:
        raise UsageError(
            f"the plan shortlists at {plan.shortlist_dim}-d, the index has shortlists over "
            f"{list(meta.shortlist_dims)}; take one of these, or scan"
        )


def read_queries(queries: Sequence[pb.Query], *, limits: RequestLimits, dim: int) -> Queries:
    """Return queries by kind. Of images only the size is checked; the encoder decodes them."""
    check_num(queries, "queries", limits)
    by_kind = Queries({}, {}, {})
    for position, query in enumerate(queries):
        kind = query.WhichOneof("kind")
        if kind == "vector":
            by_kind.vectors[position] = read_vector(query.vector, dim)
        elif kind == "image":
            by_kind.images[position] = check_image(query.image, limits)
        elif kind == "image_id":
            by_kind.image_ids[position] = check_id(query.image_id, limits)
        else:
            raise invalid(f"query {position} is empty; set vector, image or image_id")
    return by_kind


def read_vector(data: bytes, dim: int) -> npt.NDArray[np.float32]:
    """Return float32 [dim] from little-endian bytes; refuse a wrong size, NaN, infinity and the zero vector."""
    if len(data) != 4 * dim:
        raise invalid(
            f"the vector has {len(data)} bytes; {dim} float32 numbers are {4 * dim}: send the whole "
            "embedding, the plan cuts prefixes"
        )
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        squared_length = float(vector.dot(vector))
    if 0 < squared_length < np.inf:  # then all numbers are finite
        return vector
    if not np.isfinite(vector).all():
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise invalid(f"the vector holds {vector[bad]} at position {bad}; send finite numbers")
    with np.errstate(over="ignore"):
        norm = np.linalg.norm(vector)
    if not 0 < norm < np.inf:
        raise invalid(f"the vector has length {norm} in float32 and so no direction; send the encoder's output")
    return vector


def check_image(data: bytes, limits: RequestLimits) -> bytes:
    """Return ``data``; refuse it if it is too large."""
    if len(data) > limits.max_image_bytes:
        raise invalid(f"the image has {len(data)} bytes, the limit is {limits.max_image_bytes}; send a smaller file")
    return data


def has_images(request: Any) -> bool:
    """Whether answering ``request`` means decoding an image."""
    if isinstance(request, pb.EmbedRequest):
        return True
    return any(item.WhichOneof(kind) == "image" for item, kind in _items(request))


def count_pixels(request: Any, limits: RequestLimits) -> int:
    """Return the pixels of the images of ``request``, as their headers say.

    An image that the limits refuse counts none, and neither does one whose header says nothing: it is not decoded, or
    has at most as many pixels as bytes.
    """
    if isinstance(request, pb.EmbedRequest):
        images = iter(request.images)
    else:
        images = (item.image for item, kind in _items(request) if item.WhichOneof(kind) == "image")
    sizes = (read_size(image) for image in images)
    return sum(width * height for width, height in sizes if width * height <= limits.max_pixels)


def _items(request: Any) -> Iterator[tuple[Any, str]]:
    """The parts of a request that may be images, each with the name of its choice."""
    if isinstance(request, pb.UpsertRequest):
        yield from ((row, "content") for row in request.rows)
    elif isinstance(request, pb.SearchRequest):
        yield request.query, "kind"
    elif isinstance(request, pb.SearchBatchRequest):
        yield from ((query, "kind") for query in request.queries)


def check_id(image_id: str, limits: RequestLimits) -> str:
    """Return ``image_id``; refuse it if it is empty or too long."""
    size = len(image_id.encode())
    if not 1 <= size <= limits.max_id_bytes:
        raise invalid(
            f"the id {shorten(image_id)} has {size} bytes; ids have 1 to {limits.max_id_bytes} "
            "(limits.max_id_bytes of the service)"
        )
    return image_id


def check_num(items: Sequence[object], what: str, limits: RequestLimits) -> None:
    """Refuse an empty request and one with too many items."""
    if not 1 <= len(items) <= limits.max_batch:
        raise invalid(f"{len(items)} {what} in one request; send 1 to {limits.max_batch}")


async def write_results(answer: Answer, num_queries: int, deadline: float) -> list[pb.HitList]:
    """Return the hits of each query of ``answer``, best first; RESOURCE_EXHAUSTED if they exceed a message.

    Other requests get their turn every ``SLICE_HITS`` hits; DEADLINE_EXCEEDED once the loop's clock passes
    ``deadline``.
    """
    results, written, size, loop = list[pb.HitList](), 0, 0, asyncio.get_running_loop()
    k = answer.hits.rows.shape[1]
    for query in range(num_queries):
        message = pb.HitList()
        for first in range(0, k, SLICE_HITS):
            if written >= SLICE_HITS:
                await asyncio.sleep(0)
                written = 0
                if loop.time() > deadline:
                    raise RetrievalError(
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                        f"{query} of {num_queries} answers were written in time; ask for fewer hits or allow more time",
                    )
            written += min(SLICE_HITS, k - first)
            write_hits(message, answer, query, first)
        results.append(message)
        size += message.ByteSize()
        check_answer(size)
    return results


def check_local(peer: str) -> None:
    """Raise PERMISSION_DENIED unless ``peer``, as gRPC names it, is on this machine."""
    if not peer.startswith(LOCAL_PEERS):
        raise RetrievalError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"caller {peer} is on another machine; set serve.loopback_only=false to admit it",
        )


def check_answer(size_bytes: int) -> None:
    """Raise RESOURCE_EXHAUSTED for an answer that no client could take, and that would end a stream."""
    if size_bytes > MAX_ANSWER_BYTES:
        raise RetrievalError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the answer has more than {MAX_ANSWER_BYTES} bytes; ask for a smaller k, or fewer queries or images at "
            "once",
        )


def write_hits(message: pb.HitList, answer: Answer, query: int, first: int = 0) -> None:
    """Add to ``message`` the hits of one query of ``answer``, at most ``SLICE_HITS`` from place ``first`` on."""
    add, others, part = message.hits.add, list(enumerate(answer.names))[1:], slice(first, first + SLICE_HITS)
    hits = answer.hits
    for row, score in zip(hits.rows[query, part].tolist(), hits.scores[query, part].tolist(), strict=True):
        if row >= 0:
            entry = answer.entries[row]
            metadata = add(id=entry[0], score=score).metadata  # filled in place: a copy takes twice as long
            for place, name in others:
                if (value := entry[place]) is not None:
                    metadata[name] = value


def check_num_hits(num_queries: int, k: int, limits: RequestLimits) -> None:
    """Refuse a request for too many hits."""
    if num_queries * k > limits.max_hits:
        raise invalid(
            f"{num_queries} queries with k={k} ask for {num_queries * k} hits, a request may for {limits.max_hits}; "
            "send fewer queries at once, or raise limits.max_hits of the service"
        )


def check_feedback(request: pb.FeedbackRequest, *, has_log: bool) -> None:
    """Refuse feedback that cannot be logged."""
    if not has_log:
        raise refused("feedback goes to the access log, which is off; set serve.access_log.folder")
    if not REQUEST_ID.fullmatch(request.request_id):
        raise invalid(
            f"request_id={request.request_id[:40]!r} names no answer; send SearchInfo.request_id, 24 digits "
            "of 0-9 and a-f"
        )
    if len(request.id) > MAX_HIT_ID:
        raise invalid(f"the id has {len(request.id)} characters, at most {MAX_HIT_ID} are taken; send the hit's own id")
    if not FEEDBACK_KIND.fullmatch(request.kind):
        raise invalid(
            f"kind={request.kind[:40]!r} is not a short word; send a small letter and at most 31 of a-z, 0-9, _ "
            "and -, as in 'click'"
        )
