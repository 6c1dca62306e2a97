"""Answers to a stream of requests, several worked on at a time and given in order; bounds of open streams."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import grpc

from lookalike.serve.wire.errors import RetrievalError

Q = TypeVar("Q")
A = TypeVar("A")
LOOK_S = 1.0
"""Pause between two looks at an open stream, in seconds."""
Look = Callable[[float], None]
"""Called while a stream is open, with the seconds for which nothing was read or worked on; raises to end it."""


class Streams:
    """The open streams of one replica: ``most`` in all, and half of them of one tenant."""

    def __init__(self, most: int) -> None:
        self._most, self._open = most, Counter[str]()

    @contextmanager
    def hold(self, tenant: str, most: int | None = None) -> Iterator[None]:
        """Count a stream of ``tenant`` during the block; RESOURCE_EXHAUSTED beyond the bounds, or its own ``most``."""
        own = most if most is not None else max(1, self._most // 2) if tenant else self._most
        if self._open[tenant] >= own or self._open.total() >= self._most:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._open.total()} streams are open, {self._open[tenant]} of this caller, who may have {own} of "
                f"{self._most}; close one, or send its batches over one that is open",
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1


def check_idle(idle_s: float, most_s: float) -> None:
    """Raise DEADLINE_EXCEEDED for a stream that has been idle too long."""
    if idle_s > most_s:
        raise RetrievalError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no batch came for {most_s:g} s, so the stream was ended; open one when there is something to send",
        )


async def answer_in_order(
    requests: AsyncIterator[Q],
    answer: Callable[[Q], Coroutine[Any, Any, A]],
    window: int,
    look: Look = lambda idle_s: None,
) -> AsyncIterator[A]:
    """Answers in the order of ``requests``, which are read only while fewer than ``window`` are unanswered."""
    clock = asyncio.get_running_loop().time
    active = looked = clock()
    begun: deque[asyncio.Task[A]] = deque()
    reading: asyncio.Future[Q | None] | None = None
    ended = False
    try:
        while begun or not ended:
            if reading is None and not ended and len(begun) < window:
                reading = asyncio.ensure_future(anext(requests, None))
            awaited: list[asyncio.Future[Any]] = [*([reading] if reading else []), *islice(begun, 1)]
            done, _ = await asyncio.wait(awaited, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            now = clock()
            if done or begun:
                active = now
            if now - looked >= LOOK_S:
                look(now - active)
                looked = now
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                ended = request is None
                if request is not None:
                    begun.append(asyncio.ensure_future(answer(request)))
            while begun and begun[0].done():
                yield begun.popleft().result()
                active = clock()
    finally:  # the caller may have gone
        if reading is not None:
            reading.cancel()
        for task in begun:
            task.cancel()
