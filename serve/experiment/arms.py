"""Carries out what an experiment decided: one arm answers, or two do and the hits are drafted."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from lookalike.serve.experiment.assignment import Assignment, Experiment, Route
from lookalike.serve.experiment.interleave import coins, draft
from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.watching import INTERLEAVED
from lookalike.serve.watch import trace
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import DEFAULT_K

Answered = tuple[list[pb.HitList], pb.SearchInfo]
"""The hits of each query, and what produced them."""
Search = Callable[[Route, Sequence[pb.Query], pb.SearchOptions], Awaitable[Answered]]


async def answer(
    experiment: Experiment | None,
    served: Generation,
    queries: Sequence[pb.Query],
    options: pb.SearchOptions,
    search: Search,
) -> Answered:
    """The answer of the arm, or arms, that the request belongs to; of ``served`` outside an experiment."""
    seen = trace.current()
    seen.k = options.k if options.HasField("k") else DEFAULT_K
    seen.num_queries = len(queries)
    assigned = Assignment([Route("", served)])
    if experiment is not None:
        assigned = experiment.assign(served, queries, options)
        if assigned.routes[0].arm:
            seen.experiment, seen.session = experiment.settings.name, options.session
    seen.forced, seen.arm = assigned.forced, assigned.routes[0].arm
    if len(assigned.routes) == 1:
        results, info = await _timed(assigned.routes[0], queries, options, search)
    else:
        assert experiment is not None
        results, info = await _together(experiment.settings.name, assigned.routes, queries, options, search)
    info.request_id, info.arm = seen.request_id, seen.arm
    seen.info, seen.results = info, results
    return results, info


async def _timed(route: Route, queries: Sequence[pb.Query], options: pb.SearchOptions, search: Search) -> Answered:
    start, code = time.perf_counter(), "INTERNAL"
    try:
        answered = await search(route, queries, options)
        code = "OK"
    except RetrievalError as error:
        code = error.code.name
        raise
    except asyncio.CancelledError:
        code = "CANCELLED"
        raise
    finally:
        if route.arm:
            duration_ms = (time.perf_counter() - start) * 1000
            trace.current().outcomes.append(trace.Outcome(route.arm, code, duration_ms))
    return answered


async def _together(
    experiment: str, routes: Sequence[Route], queries: Sequence[pb.Query], options: pb.SearchOptions, search: Search
) -> Answered:
    """Both arms' hits in one list; those of one arm where the other failed, which makes the request a forced one."""
    seen = trace.current()
    seen.arm = INTERLEAVED
    asked = (_timed(route, queries, options, search) for route in routes)
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, RetrievalError):
            raise outcome
    good = [
        (route.arm, outcome)
        for route, outcome in zip(routes, outcomes, strict=True)
        if not isinstance(outcome, BaseException)
    ]
    if not good:
        assert isinstance(outcomes[0], RetrievalError)
        raise outcomes[0]
    if len(good) == 1:
        seen.arm, seen.forced = good[0][0], "failed"
        return good[0][1]
    (first, (hits, info)), (second, (other_hits, other_info)) = good
    k = seen.k or DEFAULT_K
    results = [
        draft(
            one.hits, other.hits, (first, second), k, coins(experiment, options.session, seen.request_id, str(position))
        )
        for position, (one, other) in enumerate(zip(hits, other_hits, strict=True))
    ]
    return results, _joined(info, other_info)


def _joined(first: pb.SearchInfo, second: pb.SearchInfo) -> pb.SearchInfo:
    """Control's, with the lower coverage and the longer times: the arms were asked at the same time."""
    info = pb.SearchInfo()
    info.CopyFrom(first)
    coverages = [one.coverage for one in (first, second)]
    info.coverage.CopyFrom(min(coverages, key=lambda one: one.shards_answered / max(1, one.shards_asked)))
    info.degraded = first.degraded or second.degraded
    times: dict[str, float] = {}
    for part in (*first.stage_times, *second.stage_times):
        times[part.stage] = max(times.get(part.stage, 0.0), part.duration_ms)
    del info.stage_times[:]
    info.stage_times.extend(pb.StageTime(stage=stage, duration_ms=duration) for stage, duration in times.items())
    return info
