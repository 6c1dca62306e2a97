"""Fan-out: ask every shard, wait as long as the request allows, merge what came.

A worker is an object with async methods, in this process or behind a Serve handle; nothing here depends on which, so
every placement gives the same answers.
"""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from lookalike.retrieval.filters import Conditions
from lookalike.retrieval.plan import Plan
from lookalike.serve.search.batching import BatchedShard
from lookalike.serve.search.retries import Hedges, repeat
from lookalike.serve.settings.load import Batching, Retries
from lookalike.serve.wire.answers import Answer, merge, unpack
from lookalike.serve.wire.errors import NotLoadedError, RetrievalError, invalid, shorten
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
Floats = npt.NDArray[np.float32]
Worker = Any
"""A worker of ``lookalike.serve.search.workers``, or the Serve handle of one."""


class Found(NamedTuple):
    """An answer, how many shards it rests on and the milliseconds its parts took."""

    answer: Answer
    shards_answered: int
    times_ms: dict[str, float]


class Router:
    """The workers that serve one index. Deadlines are times of the running loop's clock, in seconds.

    A call whose worker is gone is made again, within the deadline; see ``retries``.
    """

    def __init__(
        self,
        shards: Sequence[Worker],
        reranker: Worker | None = None,
        encoder: Worker | None = None,
        *,
        retries: Retries | None = None,
        batching: Batching | None = None,
    ) -> None:
        self.shards, self.reranker, self.encoder = list(shards), reranker, encoder
        self.retries = Retries() if retries is None else retries
        self._hedges = Hedges(self.retries)
        shared = shards if batching is not None else []
        self._batched = [BatchedShard(shard, batching or Batching(), self._ask_shard) for shard in shared]

    def patient(self) -> "Router":
        """The same workers for who can wait: a slow call is made once, and none is shared with others."""
        retries = self.retries.model_copy(update={"hedge_ms": None})
        return Router(self.shards, self.reranker, self.encoder, retries=retries)

    async def search(
        self,
        generation: str,
        queries: Floats,
        k: int,
        plan: Plan,
        filters: Conditions | None = None,
        *,
        deadline: float,
        allow_partial: bool,
    ) -> Found:
        """The ``k`` best rows of ``generation`` for each query, float32 [n, dim], that meet the ``filters``.

        Raises UNAVAILABLE or DEADLINE_EXCEEDED when a shard fails or is late, unless ``allow_partial``; then only when
        none answered. ``NotLoadedError``: the workers do not hold ``generation`` any more.
        """
        call = (generation, np.ascontiguousarray(queries, "<f4").tobytes(), k, plan.model_dump_json())
        method = "search" if self.reranker is None else "shortlist"
        start = time.perf_counter()
        shared = self._batched if method == "search" and len(queries) == 1 else []
        outcomes = await self._ask_shards(method, *call, json.dumps(filters or {}), deadline=deadline, shards=shared)
        good = accept(outcomes, allow_partial=allow_partial)
        times = {"shards": _since_ms(start)}
        if self.reranker is not None:
            start = time.perf_counter()
            outcome = await self._ask(self.reranker, "rerank", *call, good, deadline=deadline, who="re-ranker")
            packed = accept([outcome], allow_partial=False, who="re-ranker")[0]
            answer = unpack(packed, len(queries))
            times["rerank"] = _since_ms(start)
        else:
            start = time.perf_counter()
            answer = merge([unpack(packed, len(queries)) for packed in good.values()], k)
            times["merge"] = _since_ms(start)
        return Found(answer, len(good), times)

    async def stored_vectors(self, generation: str, image_ids: Sequence[str], *, deadline: float) -> list[Floats]:
        """The vectors that ``generation`` stores under ``image_ids``; NOT_FOUND names the first that no shard holds."""
        outcomes = await self._ask_shards("vectors", generation, list(image_ids), deadline=deadline)
        found: dict[str, bytes] = {}
        for outcome in outcomes:
            found |= {} if isinstance(outcome, Exception) else outcome
        missing = [image_id for image_id in image_ids if image_id not in found]
        if missing:
            accept(outcomes, allow_partial=False)  # a lost shard may hold it: that is no NOT_FOUND
            raise RetrievalError(
                grpc.StatusCode.NOT_FOUND, f"no image {shorten(missing[0])} in the index; search by the image itself"
            )
        return [np.frombuffer(found[image_id], "<f4") for image_id in image_ids]

    async def encode(self, generation: str, images: Sequence[bytes], *, deadline: float) -> list[Floats]:
        """Vectors of encoded images by the encoder of ``generation``; INVALID_ARGUMENT says why one is refused."""
        outcome = await self._ask(self.encoder, "encode", generation, list(images), deadline=deadline, who="encoder")
        results = accept([outcome], allow_partial=False, who="encoder")[0]
        for position, result in enumerate(results):
            if isinstance(result, str):
                raise invalid(result if len(results) == 1 else f"image {position}: {result}")
        return [np.frombuffer(result, "<f4") for result in results]

    async def ask_one(
        self, worker: Worker, method: str, *args: Any, deadline: float, who: str, again: bool = True
    ) -> Any:
        """What one worker answers; raises as a search does when it fails or is late.

        ``again`` says that the call may be made twice, so it is repeated when the worker is gone.
        """
        call = self._repeated(worker, method, *args, who=who) if again else ask(worker, method, *args)
        return accept([await _outcome(call, deadline)], allow_partial=False, who=who)[0]

    async def _ask_shards(self, method: str, *args: Any, deadline: float, shards: Sequence[Worker] = ()) -> list[Any]:
        """``shards`` are those that share calls: they see to hedges and repetitions themselves, for all who share."""
        calls = [ask(shard, method, *args) for shard in shards] or [
            self._ask_shard(shard, method, *args) for shard in self.shards
        ]
        return await _outcomes(calls, deadline)

    def _ask_shard(self, shard: Worker, method: str, *args: Any) -> Coroutine[Any, Any, Any]:
        return self._hedged(shard, method, *args, who="shard")

    async def _ask(self, worker: Worker, method: str, *args: Any, deadline: float, who: str) -> Any:
        return await _outcome(self._hedged(worker, method, *args, who=who), deadline)

    def _hedged(self, worker: Worker, method: str, *args: Any, who: str) -> Coroutine[Any, Any, Any]:
        return self._hedges.fastest(lambda: self._repeated(worker, method, *args, who=who), who)

    def _repeated(self, worker: Worker, method: str, *args: Any, who: str) -> Coroutine[Any, Any, Any]:
        return repeat(lambda: ask(worker, method, *args), self.retries, who)


async def ask(worker: Worker, method: str, *args: Any) -> Any:
    """Call a worker here or elsewhere; giving up on the answer also cancels the call behind a handle."""
    if not isinstance(worker, DeploymentHandle):
        return await getattr(worker, method)(*args)
    response = getattr(worker, method).remote(*args)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _outcome(call: Coroutine[Any, Any, Any], deadline: float) -> Any:
    """What ``call`` returns, or the exception it failed with; ``TimeoutError`` when it is not done by ``deadline``."""
    return (await _outcomes([call], deadline))[0]


async def _outcomes(calls: Sequence[Coroutine[Any, Any, Any]], deadline: float) -> list[Any]:
    """The same for several calls at once."""
    left_s = deadline - asyncio.get_running_loop().time()
    if left_s <= 0:
        for call in calls:
            call.close()  # it never begins
        return [TimeoutError("no time left") for _ in calls]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, timeout=left_s)
    finally:  # late, or the caller has gone
        late = [task.cancel() for task in tasks]
    return [
        TimeoutError("no answer before the deadline") if was_late else task.exception() or task.result()
        for task, was_late in zip(tasks, late, strict=True)
    ]


def accept(outcomes: Sequence[Any], *, allow_partial: bool, who: str = "shard") -> dict[int, Any]:
    """Position -> outcome of those that are no exceptions; raises ``RetrievalError`` when they do not suffice.

    That is a worker's own ``RetrievalError`` where there is one: it says what is wrong with the request.
    """
    good = {position: outcome for position, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)}
    failed = {position: outcome for position, outcome in enumerate(outcomes) if position not in good}
    told = sorted((error for error in failed.values() if isinstance(error, RetrievalError)), key=_is_not_loaded)
    if told and not (allow_partial and good):
        raise told[0]
    for position, error in failed.items():
        log.warning("failed %s", fields(who=who, number=position, error=repr(error)[:300]))
    if failed and not (allow_partial and good):
        raise _failure(failed, len(outcomes), who)
    return good


def _is_not_loaded(error: Exception) -> bool:
    return isinstance(error, NotLoadedError)


def _failure(failed: dict[int, Exception], asked: int, who: str) -> RetrievalError:
    errors = list(failed.values())
    names = f"{who} {', '.join(map(str, failed))} of {asked}" if asked > 1 else who
    remedy = "or take what is there with allow_partial" if who == "shard" else "or look into the service's log"
    if all(isinstance(error, TimeoutError) for error in errors):
        code = grpc.StatusCode.DEADLINE_EXCEEDED
        return RetrievalError(code, f"no answer in time from {names}; allow more time, {remedy}")
    if all(isinstance(error, (BackPressureError, TimeoutError)) for error in errors):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        return RetrievalError(code, f"the queue of {names} is full; slow down, or add replicas")
    reasons = "; ".join(sorted({type(error).__name__ for error in errors}))
    return RetrievalError(grpc.StatusCode.UNAVAILABLE, f"{names} failed ({reasons}); try again, {remedy}")


def _since_ms(start: float) -> float:
    return (time.perf_counter() - start) * 1000
