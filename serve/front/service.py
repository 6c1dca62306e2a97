"""The service itself: checked requests in, responses out; the ingress and local mode wrap it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

import lookalike
from lookalike.serve.experiment.arms import SearchReply, choose_routes, interleave
from lookalike.serve.experiment.assignment import Arm, Experiment, Route
from lookalike.serve.front.health import SILENT_S, Pulse
from lookalike.serve.front.observer import Observer
from lookalike.serve.front.overload import ADMITTED, Admission, ImageAdmission, Ladder, allowed_ms
from lookalike.serve.front.stream import Look, answer_in_order
from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Floats, Router, SearchOutcome
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.trace import SearchRecord, Trace
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import NotLoadedError, RetrievalError, StagedLostError, refused
from lookalike.serve.wire.handles import by_grpc
from lookalike.serve.wire.plans import to_plan
from lookalike.serve.wire.requests import (
    DEFAULT_K,
    Options,
    check_answer,
    check_feedback,
    check_image,
    check_num,
    check_num_hits,
    has_images,
    read_options,
    read_queries,
    write_results,
)
from lookalike.serve.wire.writes import check_ids, check_path, check_rows, check_uris, portions

P = ParamSpec("P")
T = TypeVar("T")
MOVE_S = 86_400.0
"""Longest time that a switch or compaction may take, in seconds; the request usually asks for less."""
Check = Callable[[pb.SearchStreamRequest], None]
Queries = Sequence[pb.Query]


class Service:
    """Answers the messages of ``lookalike.v1``; every method raises ``RetrievalError`` if it cannot.

    Methods add to the request's trace what they learn about it. A request belongs to the generation that is ``current``
    when it begins; if no worker holds that one any more, it begins again, once, with the generation that is then
    current.
    """

    def __init__(
        self, config: ServeConfig, current: Generation, router: Router, writer: Any = None, arms: Sequence[Arm] = ()
    ) -> None:
        self.config, self.current, self.router, self.writer = config, current, router, by_grpc(writer)
        self.admission = Admission(config.max_ongoing_requests, config.max_queued_requests, config.timeout_s)
        self._image_slots = ImageAdmission(config)
        self._ladder = None if config.degrade is None else Ladder(config.degrade)
        self.observer = Observer(config, router, arms)
        self.pulse = Pulse(self._search_for_health)

    def slot(self, rpc: str, request: Any, tenant: str, *, patient: bool = False) -> AbstractAsyncContextManager[None]:
        """Hold a slot for ``request`` while the block runs, if its method needs one; images have slots of their own."""
        if rpc not in ADMITTED:
            return nullcontext()
        if has_images(request):
            return self._image_slots.slot(tenant, allowed_ms(request), patient=patient)
        return self.admission.slot(allowed_ms(request), patient=patient, tenant=tenant)

    async def search(self, request: pb.SearchRequest, trace: Trace) -> pb.SearchResponse:
        reply = await self._search([request.query], request.options, trace)
        return pb.SearchResponse(hits=reply.results[0].hits, info=reply.info)

    async def search_batch(self, request: pb.SearchBatchRequest, trace: Trace) -> pb.SearchBatchResponse:
        reply = await self._search(request.queries, request.options, trace)
        return pb.SearchBatchResponse(results=reply.results, info=reply.info)

    async def _search(self, queries: Queries, options: pb.SearchOptions, trace: Trace) -> SearchReply:
        trace.k = options.k if options.HasField("k") else DEFAULT_K
        trace.num_queries = len(queries)
        experiment = self.observer.experiment
        if experiment is None:
            reply = await self._with_current(self._search_generation, queries, options, trace)
        else:
            reply = await self._with_current(self._search_arms, experiment, queries, options, trace)
        reply.info.request_id, reply.info.arm = trace.request_id, trace.arm
        trace.info, trace.results = reply.info, reply.results
        return reply

    async def _search_generation(
        self, generation: Generation, queries: Queries, message: pb.SearchOptions, trace: Trace, arm: str = ""
    ) -> SearchReply:
        options = self._options(generation, message)
        check_num_hits(len(queries), options.k, self.config.limits)
        deadline = _deadline(trace, options.timeout_s)
        vectors, times = await self._vectors(
            generation, queries, deadline, trace.tenant, allow_partial=options.allow_partial
        )
        ask = Ask(generation.meta.generation, vectors, options.k, options.plan, options.filters)
        outcome = await self.router.search(ask, deadline=deadline, allow_partial=options.allow_partial)
        if outcome.shards_answered == len(self.router.shards):
            self.pulse.answered = time.monotonic()
        outcome = outcome._replace(times_ms={**times, **outcome.times_ms})
        own_plan = message.HasField("plan") or message.HasField("min_recall")
        trace.searches.append(SearchRecord(generation, options, vectors, outcome, arm, own_plan))
        results = await write_results(outcome.answer, len(queries), deadline)
        return SearchReply(results, self._info(generation, options, outcome))

    async def _search_for_health(self) -> None:
        """One search of all shards, as most requests make it."""
        meta, plan = self.current.meta, self.current.plans.default
        ask = Ask(meta.generation, np.ones((1, meta.dim), np.float32), 1, plan)
        deadline = asyncio.get_running_loop().time() + min(SILENT_S, self.config.timeout_s)
        await self.router.search(ask, deadline=deadline, allow_partial=False)

    async def _search_arms(
        self, served: Generation, experiment: Experiment, queries: Queries, options: pb.SearchOptions, trace: Trace
    ) -> SearchReply:
        async def search(route: Route) -> SearchReply:
            if not route.arm:
                return await self._search_generation(route.generation, queries, options, trace)
            with trace.time_arm(route.arm):
                return await self._search_generation(route.generation, queries, options, trace, route.arm)

        routes = choose_routes(experiment, served, queries, options, trace)
        if len(routes) == 1:
            return await search(routes[0])
        replies = await asyncio.gather(*map(search, routes), return_exceptions=True)
        return interleave(replies, routes, options.session, trace)

    def search_stream(
        self,
        requests: AsyncIterator[pb.SearchStreamRequest],
        check: Check | None = None,
        tenant: str = "",
        look: Look = lambda idle_s: None,
        sign: Callable[[str], str] = str,
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        """Answer the batches of a stream, at most ``stream_window`` at a time.

        ``check`` may refuse a batch first; ``look`` may end the stream, also one that is idle; ``sign`` makes request
        ids the tenant's.
        """
        answer = partial(self.stream_one, check=check, tenant=tenant, sign=sign)
        return answer_in_order(requests, answer, self.config.stream_window, look)

    async def stream_one(
        self,
        request: pb.SearchStreamRequest,
        check: Check | None = None,
        tenant: str = "",
        sign: Callable[[str], str] = str,
    ) -> pb.SearchStreamResponse:
        """The answer to one batch of a stream, or why there is none. It waits for a slot, however long the queue is."""
        response = pb.SearchStreamResponse(tag=request.tag)
        try:
            with self.observer.watch("SearchStream", tenant) as trace:
                trace.request_id = sign(trace.request_id)
                if check is not None:
                    check(request)
                async with self.slot("SearchStream", request.batch, tenant, patient=True):
                    response.batch.CopyFrom(await self.search_batch(request.batch, trace))
        except RetrievalError as error:
            response.failure.CopyFrom(pb.Failure(code=error.code.value[0], message=error.message))
        return response

    async def feedback(self, request: pb.FeedbackRequest, trace: Trace) -> pb.FeedbackResponse:
        """Put feedback into the access log, as the line of its own request."""
        check_feedback(request, has_log=bool(self.config.access_log.folder))
        trace.feedback = request
        return pb.FeedbackResponse()

    async def embed(self, request: pb.EmbedRequest, trace: Trace) -> pb.EmbedResponse:
        check_num(request.images, "images", self.config.limits)
        images = [check_image(image, self.config.limits) for image in request.images]
        check_answer(len(images) * 4 * self.current.meta.dim)
        return await self._with_current(self._embed, images, _deadline(trace, self.config.timeout_s), trace.tenant)

    async def _embed(
        self, generation: Generation, images: Sequence[bytes], deadline: float, tenant: str
    ) -> pb.EmbedResponse:
        vectors = await self._encode(generation, images, deadline, tenant)
        return pb.EmbedResponse(
            vectors=[vector.tobytes() for vector in vectors],
            dim=generation.meta.dim,
            model_fingerprint=generation.meta.model_fingerprint,
        )

    async def describe(self, request: pb.DescribeRequest, trace: Trace) -> pb.DescribeResponse:
        num_rows = await self._with_current(self._count_rows, _deadline(trace, self.config.timeout_s))
        generation, meta = self.current, self.current.meta
        return pb.DescribeResponse(
            version=lookalike.__version__,
            index_generation=generation.name,
            dim=meta.dim,
            model_fingerprint=meta.model_fingerprint,
            dims=meta.dims,
            num_rows=num_rows,
            num_shards=len(self.router.shards),
            plan=to_plan(generation.plans.default),
            columns=meta.columns,
            placement=self.config.placement,
            limits=pb.Limits(**self.config.limits.model_dump()),
            has_encoder=self._can_encode(generation),
            writable=self.writer is not None,
        )

    async def _count_rows(self, generation: Generation, deadline: float) -> int:
        """Rows that a search may find: those of the index less deleted and replaced ones, and those written since."""
        if self.writer is None:
            return generation.meta.num_live
        return await self.router.count_rows(generation.name, deadline=deadline)

    async def upsert(self, request: pb.UpsertRequest, trace: Trace) -> pb.UpsertResponse:
        """Give rows their vectors, and send them to the writer in portions."""
        self._require_writer()
        deadline = _deadline(trace, self.config.timeout_s)
        return await self._with_current(self._upsert, request, deadline, trace.tenant)

    async def _upsert(
        self, generation: Generation, request: pb.UpsertRequest, deadline: float, tenant: str
    ) -> pb.UpsertResponse:
        check_rows(request, limits=self.config.limits, meta=generation.meta)
        images = [row.image for row in request.rows if row.WhichOneof("content") == "image"]
        vectors = iter(await self._encode(generation, images, deadline, tenant) if images else [])
        rows = [
            row
            if row.WhichOneof("content") == "vector"
            else pb.Row(id=row.id, vector=next(vectors).astype("<f4").tobytes(), metadata=row.metadata)
            for row in request.rows
        ]
        model = generation.meta.model_fingerprint
        messages = [pb.UpsertRequest(rows=portion, model_fingerprint=model) for portion in portions(rows)]
        return pb.UpsertResponse(write=await self._store([m.SerializeToString() for m in messages], deadline))

    async def _store(self, contents: Sequence[bytes], deadline: float) -> int:
        """Have the writer store the portions of an upsert, all or none; it sends them again if they were lost."""
        *staged, last = contents
        left = self.config.retries.max_attempts
        while True:
            upsert = uuid.uuid4().hex if staged else ""
            for place, content in enumerate(staged):
                await self._write("stage", upsert, place, content, deadline=deadline)
            try:
                return int(await self._write("upsert", last, upsert, len(staged), deadline=deadline))
            except StagedLostError:
                left -= 1
                if left <= 0:
                    raise

    async def delete(self, request: pb.DeleteRequest, trace: Trace) -> pb.DeleteResponse:
        self._require_writer()
        check_ids(request, limits=self.config.limits)
        deadline = _deadline(trace, self.config.timeout_s)
        return pb.DeleteResponse(write=await self._write("delete", request.SerializeToString(), deadline=deadline))

    async def switch(self, request: pb.SwitchRequest, trace: Trace) -> pb.SwitchResponse:
        check_uris(request)
        return pb.SwitchResponse(current=await self._move(trace, "switch", request.SerializeToString()))

    async def rollback(self, request: pb.RollbackRequest, trace: Trace) -> pb.RollbackResponse:
        return pb.RollbackResponse(current=await self._move(trace, "rollback"))

    async def compact(self, request: pb.CompactRequest, trace: Trace) -> pb.CompactResponse:
        return pb.CompactResponse(current=await self._move(trace, "compact", float(request.timeout_s)))

    async def status(self, request: pb.StatusRequest, trace: Trace) -> pb.StatusResponse:
        self._require_writer()
        deadline = _deadline(trace, self.config.timeout_s)
        response: pb.StatusResponse = pb.StatusResponse.FromString(await self._write("status", deadline=deadline))
        if (recall := self.observer.estimate(self.current)) is not None:
            response.recall.CopyFrom(recall)
        return response

    async def backup(self, request: pb.BackupRequest, trace: Trace) -> pb.BackupResponse:
        self._require_writer()
        check_path(request.path)
        deadline = _deadline(trace, MOVE_S)
        return pb.BackupResponse(last_write=await self._write("backup", request.path, deadline=deadline, again=False))

    async def _move(self, trace: Trace, method: str, *args: Any) -> pb.Generation:
        self._require_writer()
        answer = await self._write(method, *args, deadline=_deadline(trace, MOVE_S), again=False)
        generation: pb.Generation = pb.Generation.FromString(answer)
        return generation

    async def _write(self, method: str, *args: Any, deadline: float, again: bool = True) -> Any:
        """Ask the writer; a write may be made ``again``, since storing the same twice changes nothing."""
        return await self.router.ask_one(self.writer, method, *args, deadline=deadline, who="writer", again=again)

    def _require_writer(self) -> None:
        if self.writer is None:
            raise refused(
                "this service answers searches only; set writes.state to a folder to make it take writes and other "
                "indexes"
            )

    def _options(self, generation: Generation, options: pb.SearchOptions) -> Options:
        meta, plans, config = generation.meta, generation.plans, self.config
        read = read_options(options, limits=config.limits, meta=meta, plans=plans, timeout_s=config.timeout_s)
        if self._ladder is None or options.HasField("plan") or options.HasField("min_recall"):
            return read
        cheaper = self._ladder.choose(plans, self.admission.share)
        return read if cheaper is None else read._replace(plan=cheaper, degraded=True)

    async def _with_current(
        self, work: Callable[Concatenate[Generation, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        generation = self.current
        try:
            return await work(generation, *args, **kwargs)
        except NotLoadedError:
            if self.current is generation:
                raise
        return await work(self.current, *args, **kwargs)

    async def _vectors(
        self, generation: Generation, queries: Queries, deadline: float, tenant: str, *, allow_partial: bool
    ) -> tuple[Floats, dict[str, float]]:
        read = read_queries(queries, limits=self.config.limits, dim=generation.meta.dim)
        vectors, times = dict(read.vectors), {}
        if read.images:
            start = time.perf_counter()
            encoded = await self._encode(generation, list(read.images.values()), deadline, tenant)
            vectors.update(zip(read.images, encoded, strict=True))
            times["encode"] = (time.perf_counter() - start) * 1000
        if read.image_ids:
            start = time.perf_counter()
            ids = list(read.image_ids.values())
            groups = [generation.group_of(image_id, len(self.router.shards)) for image_id in ids]
            stored = await self.router.stored_vectors(
                generation.name, ids, deadline=deadline, groups=groups, allow_partial=allow_partial
            )
            vectors.update(zip(read.image_ids, stored, strict=True))
            times["lookup"] = (time.perf_counter() - start) * 1000
        return np.stack([vectors[position] for position in range(len(queries))]), times

    def _can_encode(self, generation: Generation) -> bool:
        """Whether images can be encoded; a service started without an encoder has none for a later index either."""
        return generation.encoder is not None and self.router.encoder is not None

    async def _encode(
        self, generation: Generation, images: Sequence[bytes], deadline: float, tenant: str
    ) -> list[Floats]:
        if generation.meta.encoder.external:
            model = generation.meta.encoder.name
            raise refused(
                f"the vectors of this index were made elsewhere, by {model!r}, and there is no encoder for pictures; "
                "send a vector of that model, or a stored id"
            )
        if not self._can_encode(generation):
            raise refused("this service runs without an encoder; send vectors, or set serve.encoder")
        return await self.router.encode(generation.name, images, deadline=deadline, tenant=tenant)

    def _info(self, generation: Generation, options: Options, outcome: SearchOutcome) -> pb.SearchInfo:
        return pb.SearchInfo(
            plan=to_plan(options.plan),
            index_generation=generation.meta.generation,
            model_fingerprint=generation.meta.model_fingerprint,
            coverage=pb.Coverage(shards_answered=outcome.shards_answered, shards_asked=len(self.router.shards)),
            stage_times=[pb.StageTime(stage=stage, duration_ms=ms) for stage, ms in outcome.times_ms.items()],
            degraded=options.degraded,
        )


def _deadline(trace: Trace, timeout_s: float) -> float:
    """``timeout_s`` after the request's arrival, by the loop's clock: the wait for a slot counts as its time.

    The caller's own deadline comes first if it is sooner.
    """
    return asyncio.get_running_loop().time() - trace.elapsed_s + min(timeout_s, trace.allowed_s)


RPCS: dict[str, Callable[[Service, Any, Trace], Awaitable[Any]]] = {
    "Search": Service.search,
    "SearchBatch": Service.search_batch,
    "Embed": Service.embed,
    "Describe": Service.describe,
    "Feedback": Service.feedback,
    "Upsert": Service.upsert,
    "Delete": Service.delete,
    "Switch": Service.switch,
    "Rollback": Service.rollback,
    "Compact": Service.compact,
    "Status": Service.status,
    "Backup": Service.backup,
}
"""The RPCs that answer one message with one."""
