"""Answers to a stream of requests, several worked on at a time and given in order."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import islice
from typing import Any, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


async def answer_in_order(
    requests: AsyncIterator[Q], answer: Callable[[Q], Coroutine[Any, Any, A]], window: int
) -> AsyncIterator[A]:
    """Answers in the order of ``requests``, which are read only while fewer than ``window`` are unanswered."""
    begun: deque[asyncio.Task[A]] = deque()
    reading: asyncio.Future[Q | None] | None = None
    ended = False
    try:
        while begun or not ended:
            if reading is None and not ended and len(begun) < window:
                reading = asyncio.ensure_future(anext(requests, None))
            awaited: list[asyncio.Future[Any]] = [*([reading] if reading else []), *islice(begun, 1)]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                ended = request is None
                if request is not None:
                    begun.append(asyncio.ensure_future(answer(request)))
            while begun and begun[0].done():
                yield begun.popleft().result()
    finally:  # the caller may have gone
        if reading is not None:
            reading.cancel()
        for task in begun:
            task.cancel()
