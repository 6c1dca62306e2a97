"""The service itself: checked requests in, responses out; the ingress and local mode wrap it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice
from typing import Any

import grpc
import numpy as np

import lookalike
from lookalike.serve.config import ServeConfig
from lookalike.serve.errors import RetrievalError
from lookalike.serve.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.requests import (
    Options,
    check_image,
    check_num,
    read_options,
    read_queries,
    write_hits,
    write_plan,
    write_times,
)
from lookalike.serve.router import Floats, Found, Router

Check = Callable[[pb.SearchStreamRequest], None]


class Service:
    """Answers the messages of ``lookalike.v1``; every method raises ``RetrievalError`` for what it cannot answer.

    A request belongs to the generation that is ``current`` when it begins.
    """

    def __init__(self, config: ServeConfig, current: Generation, router: Router) -> None:
        self.config, self.current, self.router = config, current, router

    async def search(self, request: pb.SearchRequest) -> pb.SearchResponse:
        """``Search``."""
        generation = self.current
        options = self._options(generation, request.options)
        found = await self._find(generation, [request.query], options)
        return pb.SearchResponse(hits=write_hits(found.answer, 0), info=self._info(generation, options, found))

    async def search_batch(self, request: pb.SearchBatchRequest) -> pb.SearchBatchResponse:
        """``SearchBatch``."""
        generation = self.current
        options = self._options(generation, request.options)
        found = await self._find(generation, request.queries, options)
        results = [pb.HitList(hits=write_hits(found.answer, query)) for query in range(len(request.queries))]
        return pb.SearchBatchResponse(results=results, info=self._info(generation, options, found))

    async def search_stream(
        self, requests: AsyncIterator[pb.SearchStreamRequest], check: Check | None = None
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        """``SearchStream``: at most ``stream_window`` batches at a time, answers in the order of the requests.

        ``check`` may refuse a batch before it is worked on.
        """
        begun: deque[asyncio.Task[pb.SearchStreamResponse]] = deque()
        reading: asyncio.Future[pb.SearchStreamRequest | None] | None = None
        ended = False
        try:
            while begun or not ended:
                if reading is None and not ended and len(begun) < self.config.stream_window:
                    reading = asyncio.ensure_future(_next(requests))
                awaited: list[asyncio.Future[Any]] = [*([reading] if reading else []), *islice(begun, 1)]
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if reading is not None and reading.done():
                    request, reading = reading.result(), None
                    ended = request is None
                    if request is not None:
                        begun.append(asyncio.ensure_future(self.stream_one(request, check)))
                while begun and begun[0].done():
                    yield begun.popleft().result()
        finally:  # the caller may have gone
            if reading is not None:
                reading.cancel()
            for task in begun:
                task.cancel()

    async def stream_one(self, request: pb.SearchStreamRequest, check: Check | None = None) -> pb.SearchStreamResponse:
        """The answer to one batch of a stream, or why there is none."""
        try:
            if check is not None:
                check(request)
            return pb.SearchStreamResponse(tag=request.tag, batch=await self.search_batch(request.batch))
        except RetrievalError as error:
            failure = pb.Failure(code=error.code.value[0], message=error.message)
            return pb.SearchStreamResponse(tag=request.tag, failure=failure)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """``Embed``."""
        check_num(request.images, "images", self.config.limits)
        images = [check_image(image, self.config.limits) for image in request.images]
        generation = self.current
        vectors = await self._encode(generation, images, _deadline(self.config.timeout_s))
        return pb.EmbedResponse(vectors=[vector.tobytes() for vector in vectors], dim=generation.meta.dim,
                                model_fingerprint=generation.meta.model_fingerprint)  # fmt: skip

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        """``Describe``."""
        generation, meta = self.current, self.current.meta
        return pb.DescribeResponse(
            version=lookalike.__version__, index_generation=generation.name, dim=meta.dim,
            model_fingerprint=meta.model_fingerprint, dims=meta.dims, num_rows=meta.num_live,
            num_shards=len(self.router.shards), plan=write_plan(generation.plans.default), columns=meta.columns,
            placement=self.config.placement, limits=pb.Limits(**self.config.limits.model_dump()),
            has_encoder=generation.encoder is not None,
        )  # fmt: skip

    def _options(self, generation: Generation, options: pb.SearchOptions) -> Options:
        return read_options(options, limits=self.config.limits, meta=generation.meta, plans=generation.plans,
                            timeout_s=self.config.timeout_s)  # fmt: skip

    async def _find(self, generation: Generation, queries: Sequence[pb.Query], options: Options) -> Found:
        deadline = _deadline(options.timeout_s)
        vectors, times = await self._vectors(generation, queries, deadline)
        found = await self.router.search(generation.name, vectors, options.k, options.plan, options.filters,
                                         deadline=deadline, allow_partial=options.allow_partial)  # fmt: skip
        return found._replace(times_ms={**times, **found.times_ms})

    async def _vectors(
        self, generation: Generation, queries: Sequence[pb.Query], deadline: float
    ) -> tuple[Floats, dict[str, float]]:
        read = read_queries(queries, limits=self.config.limits, dim=generation.meta.dim)
        vectors, times = dict(read.vectors), {}
        if read.images:
            start = time.perf_counter()
            encoded = await self._encode(generation, list(read.images.values()), deadline)
            vectors.update(zip(read.images, encoded, strict=True))
            times["encode"] = (time.perf_counter() - start) * 1000
        if read.image_ids:
            start = time.perf_counter()
            ids = list(read.image_ids.values())
            stored = await self.router.stored_vectors(generation.name, ids, deadline=deadline)
            vectors.update(zip(read.image_ids, stored, strict=True))
            times["lookup"] = (time.perf_counter() - start) * 1000
        return np.stack([vectors[position] for position in range(len(queries))]), times

    async def _encode(self, generation: Generation, images: Sequence[bytes], deadline: float) -> list[Floats]:
        if generation.encoder is None:
            raise RetrievalError(grpc.StatusCode.FAILED_PRECONDITION, "this service runs without an encoder; send "
                                 "vectors, or set serve.encoder")  # fmt: skip
        return await self.router.encode(generation.name, images, deadline=deadline)

    def _info(self, generation: Generation, options: Options, found: Found) -> pb.SearchInfo:
        coverage = pb.Coverage(shards_answered=found.shards_answered, shards_asked=len(self.router.shards))
        return pb.SearchInfo(plan=write_plan(options.plan), index_generation=generation.name,
                             model_fingerprint=generation.meta.model_fingerprint, coverage=coverage,
                             stage_times=write_times(found.times_ms))  # fmt: skip


async def _next(requests: AsyncIterator[pb.SearchStreamRequest]) -> pb.SearchStreamRequest | None:
    return await anext(requests, None)


def _deadline(timeout_s: float) -> float:
    return asyncio.get_running_loop().time() + timeout_s
