"""The service itself: checked requests in, responses out; the ingress and local mode wrap it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

import lookalike
from lookalike.retrieval.index_meta import IndexMeta
from lookalike.serve.config import ServeConfig
from lookalike.serve.errors import RetrievalError, invalid
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.requests import (
    Options,
    Plans,
    check_image,
    read_options,
    read_queries,
    write_hits,
    write_plan,
    write_times,
)
from lookalike.serve.router import Floats, Found, Router


class Service:
    """Answers the messages of ``lookalike.v1``; every method raises ``RetrievalError`` for what it cannot answer."""

    def __init__(self, config: ServeConfig, meta: IndexMeta, plans: Plans, router: Router) -> None:
        self.config, self.meta, self.plans, self.router = config, meta, plans, router

    async def search(self, request: pb.SearchRequest) -> pb.SearchResponse:
        """``Search``."""
        options = self._options(request.options)
        found = await self._find([request.query], options)
        return pb.SearchResponse(hits=write_hits(found.answer, 0), info=self._info(options, found))

    async def search_batch(self, request: pb.SearchBatchRequest) -> pb.SearchBatchResponse:
        """``SearchBatch``."""
        options = self._options(request.options)
        found = await self._find(request.queries, options)
        results = [pb.HitList(hits=write_hits(found.answer, query)) for query in range(len(request.queries))]
        return pb.SearchBatchResponse(results=results, info=self._info(options, found))

    async def search_stream(
        self, requests: AsyncIterator[pb.SearchStreamRequest]
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        """``SearchStream``: at most ``stream_window`` batches at a time, answers in the order of the requests."""
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
                        begun.append(asyncio.ensure_future(self.stream_one(request)))
                while begun and begun[0].done():
                    yield begun.popleft().result()
        finally:  # the caller may have gone
            if reading is not None:
                reading.cancel()
            for task in begun:
                task.cancel()

    async def stream_one(self, request: pb.SearchStreamRequest) -> pb.SearchStreamResponse:
        """The answer to one batch of a stream, or why there is none."""
        try:
            return pb.SearchStreamResponse(tag=request.tag, batch=await self.search_batch(request.batch))
        except RetrievalError as error:
            failure = pb.Failure(code=error.code.value[0], message=error.message)
            return pb.SearchStreamResponse(tag=request.tag, failure=failure)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """``Embed``."""
        if not 1 <= len(request.images) <= self.config.limits.max_batch:
            raise invalid(f"{len(request.images)} images in one request; send 1 to {self.config.limits.max_batch}")
        images = [check_image(image, self.config.limits) for image in request.images]
        vectors = await self.router.encode(images, deadline=_deadline(self.config.timeout_s))
        return pb.EmbedResponse(vectors=[vector.tobytes() for vector in vectors], dim=self.meta.dim,
                                model_fingerprint=self.meta.model_fingerprint)  # fmt: skip

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        """``Describe``."""
        return pb.DescribeResponse(
            version=lookalike.__version__, index_generation=self.meta.generation, dim=self.meta.dim,
            model_fingerprint=self.meta.model_fingerprint, dims=self.meta.dims, num_rows=self.meta.num_live,
            num_shards=self.meta.num_shards, plan=write_plan(self.plans.default), columns=self.meta.columns,
            placement=self.config.placement,
            limits=pb.Limits(**self.config.limits.model_dump()), has_encoder=self.router.encoder is not None,
        )  # fmt: skip

    def _options(self, options: pb.SearchOptions) -> Options:
        return read_options(options, limits=self.config.limits, meta=self.meta, plans=self.plans,
                            timeout_s=self.config.timeout_s)  # fmt: skip

    async def _find(self, queries: Sequence[pb.Query], options: Options) -> Found:
        deadline = _deadline(options.timeout_s)
        vectors, times = await self._vectors(queries, deadline)
        found = await self.router.search(vectors, options.k, options.plan, options.filters, deadline=deadline,
                                         allow_partial=options.allow_partial)  # fmt: skip
        return found._replace(times_ms={**times, **found.times_ms})

    async def _vectors(self, queries: Sequence[pb.Query], deadline: float) -> tuple[Floats, dict[str, float]]:
        read = read_queries(queries, limits=self.config.limits, dim=self.meta.dim)
        vectors, times = dict(read.vectors), {}
        if read.images:
            start = time.perf_counter()
            encoded = await self.router.encode(list(read.images.values()), deadline=deadline)
            vectors.update(zip(read.images, encoded, strict=True))
            times["encode"] = (time.perf_counter() - start) * 1000
        if read.image_ids:
            start = time.perf_counter()
            stored = await self.router.stored_vectors(list(read.image_ids.values()), deadline=deadline)
            vectors.update(zip(read.image_ids, stored, strict=True))
            times["lookup"] = (time.perf_counter() - start) * 1000
        return np.stack([vectors[position] for position in range(len(queries))]), times

    def _info(self, options: Options, found: Found) -> pb.SearchInfo:
        coverage = pb.Coverage(shards_answered=found.shards_answered, shards_asked=self.meta.num_shards)
        return pb.SearchInfo(plan=write_plan(options.plan), index_generation=self.meta.generation,
                             model_fingerprint=self.meta.model_fingerprint, coverage=coverage,
                             stage_times=write_times(found.times_ms))  # fmt: skip


async def _next(requests: AsyncIterator[pb.SearchStreamRequest]) -> pb.SearchStreamRequest | None:
    return await anext(requests, None)


def _deadline(timeout_s: float) -> float:
    return asyncio.get_running_loop().time() + timeout_s
