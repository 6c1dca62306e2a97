"""SearchStream inside the service: order, a bounded window, ping-pong, a caller that leaves."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lookalike.serve.front.service import Service
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.trace import Trace
from lookalike.serve.wire.errors import RetrievalError

WINDOW = 3


class Slow(Service):
    """Ends batch n after batch ``waits_for[n]``, which may be n itself: then never. Counts the batches in work."""

    def __init__(self, waits_for: dict[int, int]) -> None:
        nothing: Any = None
        super().__init__(ServeConfig(index="x", stream_window=WINDOW), nothing, Router([]))
        self.waits_for, self.working, self.most, self.cancelled = waits_for, 0, 0, 0
        self.ended: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def search_batch(self, request: pb.SearchBatchRequest, trace: Trace) -> pb.SearchBatchResponse:
        number = request.options.k
        self.working += 1
        self.most = max(self.most, self.working)
        try:
            if number in self.waits_for:
                await self.ended[self.waits_for[number]].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.working -= 1
        self.ended[number].set()
        if number == 7:
            raise RetrievalError(grpc.StatusCode.NOT_FOUND, "no seven")
        return pb.SearchBatchResponse()


def request(number: int) -> pb.SearchStreamRequest:
    batch = pb.SearchBatchRequest(options=pb.SearchOptions(k=number))
    return pb.SearchStreamRequest(tag=str(number), batch=batch)


def test_answers_keep_the_order_of_requests_within_a_window() -> None:
    async def run() -> None:
        service, drawn = Slow({1: 3, 2: 3, 4: 6}), []

        async def requests() -> AsyncIterator[pb.SearchStreamRequest]:
            for number in range(1, 12):
                drawn.append(number)
                yield request(number)

        found = []
        async for response in service.search_stream(requests()):
            assert len(drawn) <= int(response.tag) + WINDOW + 1
            found.append((response.tag, response.WhichOneof("outcome")))
        assert found == [(str(n), "failure" if n == 7 else "batch") for n in range(1, 12)]
        assert service.most == WINDOW

    asyncio.run(run())


def test_a_caller_that_waits_for_each_answer_gets_it() -> None:
    async def run() -> None:
        answered: asyncio.Queue[str] = asyncio.Queue()

        async def requests() -> AsyncIterator[pb.SearchStreamRequest]:
            for number in (1, 2, 3):
                yield request(number)
                assert await answered.get() == str(number)

        async for response in Slow({}).search_stream(requests()):
            answered.put_nowait(response.tag)

    asyncio.run(asyncio.wait_for(run(), 5))


@pytest.mark.parametrize("taken", [0, 1])
def test_a_caller_that_leaves_ends_the_work(taken: int) -> None:
    async def run() -> None:
        service = Slow({number: number for number in range(1 + taken, 4)})

        async def requests() -> AsyncIterator[pb.SearchStreamRequest]:
            for number in (1, 2, 3):
                yield request(number)
            await asyncio.Event().wait()

        answers = service.search_stream(requests())
        if taken:
            assert (await anext(answers)).tag == "1"
        task = asyncio.ensure_future(anext(answers))
        while service.working < 3 - taken:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while service.working:
            await asyncio.sleep(0)
        assert service.cancelled == 3 - taken

    asyncio.run(asyncio.wait_for(run(), 10))
