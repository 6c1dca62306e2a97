"""The decoders of an image encoder: a few processes, whose time callers share by turns.

Pictures wait in a lane for each tenant, and lanes take turns. A lane whose pictures are slow leaves one decoder to the
others. A picture whose request is given up leaves its lane, or takes its decoder's process with it.
"""

import asyncio
import math
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic

import grpc

from lookalike.serve.wire.errors import RetrievalError
from lookalike.vision.decoder import Decoder, DecoderLostError, Order, Reply

MAX_WAITING = 256
"""Pictures that may wait when a request with pictures begins; half as many of one tenant."""
WINDOW = 8
"""Pictures of one request that wait or are decoded at a time."""
SMOOTHING = 0.2
"""Weight of the newest picture in the moving average of a lane's decoding time."""
SLOW_S = 0.5
"""Mean time of a picture from which a lane is slow; photographs take some hundredths."""
FIRST_MEAN_S = 0.02


class Decoders:
    """``num`` decoder processes. Its methods are called in one event loop; waiting for processes takes other threads.

    The threads belong to the decoders: searches never wait for one of them.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._mean_s = defaultdict[str, float](lambda: FIRST_MEAN_S)
        self._under_way = Counter[str]()
        self._idle = [Decoder() for _ in range(num)]
        self._all = tuple(self._idle)
        self._threads = ThreadPoolExecutor(num, "decoder")
        self._lanes: dict[str, deque[_Job]] = {}

    def start(self) -> None:
        """Start the processes, so that the first pictures do not wait for that."""
        for decoder in self._all:
            decoder.start()

    @property
    def num_waiting(self) -> int:
        """Pictures in all lanes."""
        return sum(map(len, self._lanes.values()))

    def admit(self, lane: str) -> None:
        """Raise RESOURCE_EXHAUSTED if too many pictures wait, in all lanes or in this one."""
        own, every = len(self._lanes.get(lane, ())), self.num_waiting
        if own >= MAX_WAITING // 2 or every >= MAX_WAITING:
            retry_ms = math.ceil(1000 * self._mean_s[lane] * (own + 1) * max(1, len(self._lanes)) / self._num)
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{every} images wait to be decoded, {own} of this caller; retry after {retry_ms} ms",
            )

    async def decode_all(self, images: Sequence[bytes], order: Order, lane: str) -> AsyncGenerator[Reply, None]:
        """The decoded ``images`` in order, at most ``WINDOW`` under way; raises for the first that is refused."""
        tasks: deque[asyncio.Task[Reply]] = deque()
        try:
            for number in range(len(images) + WINDOW):
                if number < len(images):
                    tasks.append(asyncio.create_task(self.decode(images[number], order, lane)))
                if number >= WINDOW - 1 and tasks:
                    yield await tasks.popleft()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def decode(self, data: bytes, order: Order, lane: str) -> Reply:
        """Decode a picture when it is its turn; cancel it to give up. Raises as ``Decoder.run`` does."""
        job = _Job(data, order, lane, asyncio.get_running_loop().create_future())
        self._lanes.setdefault(lane, deque()).append(job)
        self._dispatch()
        try:
            return await job.reply
        finally:
            if job.decoder is not None:  # given up
                job.decoder.stop()
            elif not job.begun:
                self._leave(lane, job)

    def close(self) -> None:
        """End the processes and threads."""
        for decoder in self._all:
            decoder.stop()
        self._threads.shutdown()
        for decoder in self._all:
            decoder.close()

    def _leave(self, lane: str, job: "_Job") -> None:
        if job in (waiting := self._lanes.get(lane, deque())):
            waiting.remove(job)
        if not waiting:
            self._lanes.pop(lane, None)

    def _dispatch(self) -> None:
        while self._idle and (lane := next(filter(self._may_begin, self._lanes), None)) is not None:
            waiting = self._lanes.pop(lane)
            job = waiting.popleft()
            if waiting:
                self._lanes[lane] = waiting  # its next turn comes after the other lanes'
            job.begun, job.decoder = True, self._idle.pop()
            self._under_way[lane] += 1
            work = job.reply.get_loop().run_in_executor(self._threads, _run, job.decoder, job.data, job.order)
            work.add_done_callback(partial(self._finish, job, job.decoder, monotonic()))

    def _may_begin(self, lane: str) -> bool:
        return self._mean_s[lane] < SLOW_S or self._under_way[lane] < max(1, self._num - 1)

    def _finish(self, job: "_Job", decoder: Decoder, start: float, work: "asyncio.Future[Reply | Exception]") -> None:
        self._mean_s[job.lane] += SMOOTHING * (monotonic() - start - self._mean_s[job.lane])
        self._under_way[job.lane] -= 1
        job.decoder = None
        self._idle.append(decoder)
        reply = DecoderLostError("the decoders end") if work.cancelled() else work.result()
        if job.reply.done():
            pass  # given up
        elif isinstance(reply, Reply):
            job.reply.set_result(reply)
        elif isinstance(reply, DecoderLostError):
            message = f"{reply}; try again, or look into the service's log"
            job.reply.set_exception(RetrievalError(grpc.StatusCode.UNAVAILABLE, message))
        else:
            job.reply.set_exception(reply)
        self._dispatch()


def _run(decoder: Decoder, data: bytes, order: Order) -> Reply | Exception:
    """What ``decoder`` makes of a picture; an exception is returned, as nobody may be left to be told of it."""
    try:
        return decoder.run(data, order)
    except Exception as error:  # noqa: BLE001
        return error


class _Job:
    """A picture that waits, or is decoded."""

    def __init__(self, data: bytes, order: Order, lane: str, reply: "asyncio.Future[Reply]") -> None:
        self.data, self.order, self.lane, self.reply = data, order, lane, reply
        self.begun = False
        self.decoder: Decoder | None = None
