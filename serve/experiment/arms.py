"""Carries out what an experiment decides: where a request goes, and the one answer made from those of two arms."""

from collections.abc import Sequence
from typing import NamedTuple

from lookalike.serve.experiment.assignment import Experiment, Route
from lookalike.serve.experiment.interleave import coins, draft
from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.watching import INTERLEAVED
from lookalike.serve.watch.trace import Trace
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import DEFAULT_K


class SearchReply(NamedTuple):
    """The hits of each query, and what produced them."""

    results: list[pb.HitList]
    info: pb.SearchInfo


def choose_routes(
    experiment: Experiment, served: Generation, queries: Sequence[pb.Query], options: pb.SearchOptions, trace: Trace
) -> list[Route]:
    """The arm that a request belongs to, or two arms; the ``served`` generation if it stays outside the experiment."""
    routes, forced = experiment.assign(served, queries, options)
    if routes[0].arm:
        trace.experiment, trace.session = experiment.settings.name, options.session
    trace.forced, trace.arm = forced, routes[0].arm if len(routes) == 1 else INTERLEAVED
    return routes


def interleave(
    replies: Sequence[SearchReply | BaseException], routes: Sequence[Route], session: str, trace: Trace
) -> SearchReply:
    """Both arms' hits in one list. If one arm failed, the hits of the other, which makes the request a forced one.

    Raises the error of control if both failed, and any error that is no ``RetrievalError``.
    """
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, RetrievalError):
            raise reply
    by_arm = {
        route.arm: reply for route, reply in zip(routes, replies, strict=True) if not isinstance(reply, BaseException)
    }
    if not by_arm:
        assert isinstance(replies[0], RetrievalError)
        raise replies[0]
    arms = tuple(by_arm)
    if len(arms) == 1:
        trace.arm, trace.forced = arms[0], "failed"
        return by_arm[arms[0]]
    control, other = by_arm.values()
    results = []
    for position, (first, second) in enumerate(zip(control.results, other.results, strict=True)):
        flips = coins(trace.experiment, session, trace.request_id, str(position))
        results.append(draft(first.hits, second.hits, (arms[0], arms[1]), trace.k or DEFAULT_K, flips))
    return SearchReply(results, _join(control.info, other.info))


def _join(first: pb.SearchInfo, second: pb.SearchInfo) -> pb.SearchInfo:
    """Control's facts, with the lower coverage and the longer times: the arms were asked at the same time."""
    info = pb.SearchInfo()
    info.CopyFrom(first)
    info.coverage.CopyFrom(min(first.coverage, second.coverage, key=_share))
    info.degraded = first.degraded or second.degraded
    times: dict[str, float] = {}
    for part in (*first.stage_times, *second.stage_times):
        times[part.stage] = max(times.get(part.stage, 0.0), part.duration_ms)
    del info.stage_times[:]
    info.stage_times.extend(pb.StageTime(stage=stage, duration_ms=duration) for stage, duration in times.items())
    return info


def _share(coverage: pb.Coverage) -> float:
    return coverage.shards_answered / max(1, coverage.shards_asked)
