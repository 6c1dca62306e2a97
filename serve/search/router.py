"""Fan-out: ask every shard, wait as long as the request allows, merge the answers.

A worker is an object with async methods, in this process or behind a Serve handle. Nothing here depends on which, so
every placement gives the same answers.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from lookalike.serve.search.batching import BatchedShard
from lookalike.serve.search.patience import SHARE, Patience
from lookalike.serve.search.retries import Hedges, repeat
from lookalike.serve.settings.load import Batching, Retries
from lookalike.serve.wire.answers import Answer, merge, unpack
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import CallEndedError, NotLoadedError, RetrievalError, invalid, shorten
from lookalike.serve.wire.handles import by_grpc
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
Floats = npt.NDArray[np.float32]
Worker = Any
"""A worker of ``lookalike.serve.search.workers``, or the Serve handle of one."""


class SearchOutcome(NamedTuple):
    """The answer to a search, the number of shards behind it and the milliseconds that its parts took."""

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
        decode_s: float = 5.0,
    ) -> None:
        self.shards, self.reranker, self.encoder = (
            [by_grpc(shard) for shard in shards],
            by_grpc(reranker),
            by_grpc(encoder),
        )
        self.decode_s = decode_s
        self.retries = Retries() if retries is None else retries
        self._hedges, self._patience = Hedges(self.retries), Patience(self.retries)
        self._batched: list[BatchedShard] = []
        if batching is not None and reranker is None:
            self._batched = [BatchedShard(partial(self._search_shard, shard), batching) for shard in self.shards]

    def for_background(self) -> "Router":
        """A router to the same workers that makes no second calls and shares none."""
        retries = self.retries.model_copy(update={"hedge_ms": None})
        return Router(self.shards, self.reranker, self.encoder, retries=retries, decode_s=self.decode_s)

    async def search(self, ask: Ask, *, deadline: float, allow_partial: bool) -> SearchOutcome:
        """The best rows for each query of ``ask``.

        Raises UNAVAILABLE or DEADLINE_EXCEEDED if a shard fails or is late; with ``allow_partial`` only if none
        answered, and shards that are silent while others have answered are not waited for to the end (``patience``).
        ``NotLoadedError``: the workers no longer hold the generation.
        """
        start = time.perf_counter()
        if self.reranker is not None:
            calls = [self._hedged(shard, "shortlist", ask, who="shard") for shard in self.shards]
        elif self._batched and len(ask.queries) == 1:  # their shared calls are hedged and repeated
            calls = [shard.search(ask) for shard in self._batched]
        else:
            calls = [self._search_shard(shard, ask) for shard in self.shards]
        patience = self._patience if allow_partial and len(calls) > 1 else None
        by_shard = accept(await _outcomes(calls, deadline, patience), allow_partial=allow_partial)
        times = {"shards": _since_ms(start)}
        start = time.perf_counter()
        if self.reranker is not None:
            reranked = await self._ask(self.reranker, "rerank", ask, by_shard, deadline=deadline, who="re-ranker")
            answer = unpack(reranked, len(ask.queries))
            times["rerank"] = _since_ms(start)
        else:
            answer = merge([unpack(packed, len(ask.queries)) for packed in by_shard.values()], ask.k)
            times["merge"] = _since_ms(start)
        return SearchOutcome(answer, len(by_shard), times)

    async def stored_vectors(
        self,
        generation: str,
        image_ids: Sequence[str],
        *,
        deadline: float,
        groups: Sequence[int] = (),
        allow_partial: bool = False,
    ) -> list[Floats]:
        """The vectors stored in ``generation`` under ``image_ids``; NOT_FOUND names the first id that is missing.

        ``groups`` has for each id the number of the shard that holds it, if anyone does; without it all are asked. A
        shard that is lost fails only requests for its own ids, and with ``allow_partial`` before the deadline.
        """
        asked = {shard: list(image_ids) for shard in range(len(self.shards))}
        if groups:
            asked = {shard: [] for shard in groups}
            for image_id, shard in zip(image_ids, groups, strict=True):
                asked[shard].append(image_id)
        now = asyncio.get_running_loop().time()
        until = now + SHARE * (deadline - now) if allow_partial else deadline
        calls = [
            self._hedged(self.shards[shard], "vectors", generation, own, who="shard") for shard, own in asked.items()
        ]
        by_shard = dict(zip(asked, await _outcomes(calls, until), strict=True))
        vectors: dict[str, bytes] = {}
        for outcome in by_shard.values():
            vectors |= {} if isinstance(outcome, Exception) else outcome
        for place, image_id in enumerate(image_ids):
            if image_id not in vectors:
                holders = [groups[place]] if groups else list(by_shard)
                self._explain_missing(
                    image_id, {shard: by_shard[shard] for shard in holders}, is_early=until < deadline
                )
        return [np.frombuffer(vectors[image_id], "<f4") for image_id in image_ids]

    def _explain_missing(self, image_id: str, by_shard: dict[int, Any], *, is_early: bool) -> None:
        """Raise NOT_FOUND, or the failure of a shard that may hold ``image_id``: then it is not known to be missing."""
        late = [shard for shard, outcome in by_shard.items() if isinstance(outcome, TimeoutError)]
        if late and is_early:
            raise RetrievalError(
                grpc.StatusCode.UNAVAILABLE,
                f"shard {late[0]} of {len(self.shards)}, which would hold {shorten(image_id)}, does not answer; try "
                "again, or search by the image itself",
            )
        accept(list(by_shard.values()), allow_partial=False, numbers=list(by_shard), num_workers=len(self.shards))
        raise RetrievalError(
            grpc.StatusCode.NOT_FOUND, f"no image {shorten(image_id)} in the index; search by the image itself"
        )

    async def count_rows(self, generation: str, *, deadline: float) -> int:
        """Rows of ``generation`` that a search may find, written ones included; raises as ``search`` does."""
        calls = [self._repeated(shard, "count_rows", generation, who="shard") for shard in self.shards]
        counts: list[int] = list(accept(await _outcomes(calls, deadline), allow_partial=False).values())
        return sum(counts)

    async def encode(
        self, generation: str, images: Sequence[bytes], *, deadline: float, tenant: str = ""
    ) -> list[Floats]:
        """Vectors of encoded images by the encoder of ``generation``; INVALID_ARGUMENT says why one is refused.

        An encoder that is silent for longer than the images may take is taken for lost, and another is asked.
        """
        patience_s = self.decode_s * len(images)
        call = partial(self._repeated, self.encoder, "encode", generation, list(images), tenant, who="encoder")
        results = await _accepted(self._hedges.second(call, "encoder", patience_s), deadline, "encoder")
        for position, result in enumerate(results):
            if isinstance(result, str):
                raise invalid(result if len(images) == 1 else f"image {position}: {result}")
        return [np.frombuffer(result, "<f4") for result in results]

    async def ask_one(
        self, worker: Worker, method: str, *args: Any, deadline: float, who: str, again: bool = True
    ) -> Any:
        """The answer of one worker; raises as ``search`` does if it fails or is late.

        ``again``: the call may be made twice, so it is repeated when the worker is gone.
        """
        call = self._repeated(worker, method, *args, who=who) if again else ask_worker(worker, method, *args)
        return await _accepted(call, deadline, who)

    async def _ask(self, worker: Worker, method: str, *args: Any, deadline: float, who: str) -> Any:
        return await _accepted(self._hedged(worker, method, *args, who=who), deadline, who)

    def _search_shard(self, shard: Worker, ask: Ask) -> Coroutine[Any, Any, Any]:
        return self._hedged(shard, "search", ask, who="shard")

    def _hedged(self, worker: Worker, method: str, *args: Any, who: str) -> Coroutine[Any, Any, Any]:
        return self._hedges.fastest(lambda: self._repeated(worker, method, *args, who=who), who)

    def _repeated(self, worker: Worker, method: str, *args: Any, who: str) -> Coroutine[Any, Any, Any]:
        return repeat(lambda: ask_worker(worker, method, *args), self.retries, who)


async def ask_worker(worker: Worker, method: str, *args: Any) -> Any:
    """Call a worker here or in another process, where giving up on the answer also cancels the call."""
    if not isinstance(worker, DeploymentHandle):
        return await getattr(worker, method)(*args)
    packed = (arg.packed if isinstance(arg, Ask) else arg for arg in args)
    response = getattr(worker, method).remote(*packed)
    try:
        return await response
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and not task.cancelling():
            raise CallEndedError(method) from None  # nobody here gave up: the replica did
        response.cancel()
        raise


async def _accepted(call: Coroutine[Any, Any, Any], deadline: float, who: str) -> Any:
    """The result of ``call``; raises ``RetrievalError`` if it fails, or is not done by ``deadline``."""
    return accept(await _outcomes([call], deadline), allow_partial=False, who=who)[0]


async def _outcomes(
    calls: Sequence[Coroutine[Any, Any, Any]], deadline: float, patience: Patience | None = None
) -> list[Any]:
    """For each call its result, the exception it raised, or ``TimeoutError`` if it is not done in time.

    In time is before ``deadline``, or while ``patience`` lasts.
    """
    left_s = deadline - asyncio.get_running_loop().time()
    if left_s <= 0:
        for call in calls:
            call.close()  # it never begins
        return [TimeoutError("no time left") for _ in calls]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        if patience is None:
            await asyncio.wait(tasks, timeout=left_s)
        else:
            await patience.wait(tasks, deadline)
    finally:  # late, or the caller has gone
        late = [task.cancel() for task in tasks]
    return [
        TimeoutError("no answer before the deadline") if was_late else _outcome_of(task)
        for task, was_late in zip(tasks, late, strict=True)
    ]


def _outcome_of(task: asyncio.Future[Any]) -> Any:
    return CallEndedError("a worker") if task.cancelled() else task.exception() or task.result()


def accept(
    outcomes: Sequence[Any],
    *,
    allow_partial: bool,
    who: str = "shard",
    numbers: Sequence[int] | None = None,
    num_workers: int = 0,
) -> dict[int, Any]:
    """Successful outcomes by position; raises ``RetrievalError`` if there are too few.

    A worker's own ``RetrievalError`` goes first: it says what is wrong with the request. ``numbers`` are those of the
    workers that were asked, of ``num_workers`` in all; without them all were asked.
    """
    names, total = numbers or range(len(outcomes)), num_workers or len(outcomes)
    good = {name: outcome for name, outcome in zip(names, outcomes, strict=True) if not isinstance(outcome, Exception)}
    failed = {name: outcome for name, outcome in zip(names, outcomes, strict=True) if name not in good}
    refusals = [error for error in failed.values() if isinstance(error, RetrievalError)]
    refusals.sort(key=lambda error: isinstance(error, (NotLoadedError, CallEndedError)))
    if refusals and not (allow_partial and good):
        raise refusals[0]
    for name, error in failed.items():
        log.warning("failed %s", fields(who=who, number=name, error=repr(error)[:300]))
    if failed and not (allow_partial and good):
        raise _failure(failed, total, who)
    return good


def _failure(failed: dict[int, Exception], num_workers: int, who: str) -> RetrievalError:
    errors = list(failed.values())
    names = f"{who} {', '.join(map(str, failed))} of {num_workers}" if num_workers > 1 else who
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
